// The gradient of the filter for NHWC images, k = 3, 5 or 7, stride 1 or 2.
//
// A block owns 128 bytes of channels, a strip of columns and a slice of the batch's rows. It reads image and gradient
// once, by cp.async, into two rings. Each thread keeps the sums of one filter row (kernel x 8 channels, in registers);
// threads with the other filter rows read the same rings. At the end the threads that shared a filter row add up in a
// fixed order, and the block writes its sums to the workspace: no atomics, and the same result at every run.
#include "cuda/depthwise.h"
#include "cuda/row_ring.cuh"

namespace rkl::cuda {
namespace {

constexpr int kAcross = 4;  // outputs that a thread works on at a time

template <int kernel, int stride>
struct Step {
  static constexpr int kRows = stride == 1 ? 4 : 2;  // of outputs, a step
  static constexpr int kAdvance = kRows * stride;
  static constexpr int kWindow = (kRows - 1) * stride + kernel;
  static constexpr int kInputCapacity = kWindow + kAdvance, kGradCapacity = 2 * kRows;
  // Threads: (vectors of channels, filter rows and one more for the bias, groups that take the step's outputs in turn).
  static constexpr int kGroups = kernel == 7 ? 2 : 4;
  static constexpr int kMaxThreads = kVectors * (kernel + 1) * kGroups;
  static constexpr int kBlocks = kernel == 7 ? 3 : 512 / kMaxThreads;  // bounds the registers: 7 sums need 168
  static constexpr int width(int columns) { return (columns * kAcross - 1) * stride + kernel; }
};

struct Grid {
  int strips, columns, channel_blocks;  // columns: of kAcross outputs, in a strip
  int slice_rows;                       // output rows of all images that a block has
};

template <class T, int kernel, int stride>
__global__ void __launch_bounds__(Step<kernel, stride>::kMaxThreads, Step<kernel, stride>::kBlocks)
    weight_grad_nhwc_kernel(WeightGrad a, Grid grid) {
  using S = Step<kernel, stride>;
  using V = Vec<T>;
  constexpr int kRows = S::kRows;
  constexpr int kInputs = (kAcross - 1) * stride + kernel;
  extern __shared__ __align__(16) unsigned char memory[];

  const Conv2d& g = a.g;
  const int strip = blockIdx.x % grid.strips, channel_block = blockIdx.x / grid.strips % grid.channel_blocks;
  const int slice = blockIdx.x / grid.strips / grid.channel_blocks;
  const int c = (channel_block * kVectors + int(threadIdx.x)) * V::size;
  const bool live = c < g.channels;
  const int kh = threadIdx.y, x0 = strip * grid.columns * kAcross;
  RowRing<T, S::kInputCapacity> in{
      reinterpret_cast<V*>(memory), nullptr,   live, int(g.in_h), int(g.in_w), S::width(grid.columns), 0,
      x0 * stride - g.padding_w,    g.channels};
  RowRing<T, S::kGradCapacity> out{in.slots + S::kInputCapacity * in.width * kVectors,
                                   nullptr,
                                   live,
                                   int(g.out_h),
                                   int(g.out_w),
                                   grid.columns * kAcross,
                                   0,
                                   x0,
                                   g.channels};
  float sums[kernel][V::size] = {};  // of filter row kh; the row past the last has the bias's sum in its first place

  const int first = slice * grid.slice_rows, end = min(first + grid.slice_rows, int(g.batch * g.out_h));
  int n = first / int(g.out_h), y0 = first - n * int(g.out_h);
  for (int row = first; row < end; ++n, y0 = 0) {  // one image, or the part of it that is in the slice, at a time
    const int rows = min(int(g.out_h) - y0, end - row), steps = (rows + kRows - 1) / kRows;
    row += rows;
    in.image = static_cast<const T*>(a.x) + int64_t(n) * g.in_h * g.in_w * g.channels + (live ? c : 0);
    in.top = y0 * stride - g.padding_h;
    out.image = static_cast<const T*>(a.grad) + int64_t(n) * g.out_h * g.out_w * g.channels + (live ? c : 0);
    out.top = y0;
    out.h = y0 + rows;  // rows of the next slice count as zero
    in.load(0, S::kWindow);
    out.load(0, kRows);
    cp_async_commit();
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) {
        in.load(S::kWindow + step * S::kAdvance, S::kAdvance);
        out.load((step + 1) * kRows, kRows);
      }
      cp_async_commit();
      cp_async_wait<1>();  // all but the next step's rows
      __syncthreads();
      for (int item = threadIdx.z; item < kRows * grid.columns; item += S::kGroups) {
        const int r = item % kRows, column = item / kRows * kAcross;
        const V* grads = out.at(step * kRows + r, column);
        const V* inputs = in.at(step * S::kAdvance + r * stride + kh, column * stride);
        float d[kAcross][V::size];
#pragma unroll
        for (int p = 0; p < kAcross; ++p) to_floats(grads[p * kVectors], d[p]);
        if (kh == kernel) {
#pragma unroll
          for (int p = 0; p < kAcross; ++p)
#pragma unroll
            for (int e = 0; e < V::size; ++e) sums[0][e] += d[p][e];
          continue;
        }
#pragma unroll
        for (int j = 0; j < kInputs; ++j) {
          float v[V::size];
          to_floats(inputs[j * kVectors], v);
#pragma unroll
          for (int p = 0; p < kAcross; ++p) {
            const int kw = j - p * stride;
            if (kw < 0 || kw >= kernel) continue;
#pragma unroll
            for (int e = 0; e < V::size; ++e) sums[kw][e] += d[p][e] * v[e];
          }
        }
      }
      __syncthreads();  // the rows that the next loads overwrite have been read by all
    }
  }
  cp_async_wait<0>();

  // The groups' sums, one after the other into the same place: group 0 sets, the others add.
  constexpr int kTaps = kernel * kernel + 1;
  float* total = reinterpret_cast<float*>(memory);  // [tap][channel of the block]
  for (int group = 0; group < S::kGroups; ++group) {
    __syncthreads();
    if (int(threadIdx.z) != group) continue;
#pragma unroll
    for (int kw = 0; kw < kernel; ++kw) {
      if (kh == kernel && kw > 0) continue;
      float* at = total + ((kh * kernel + kw) * kVectors + threadIdx.x) * V::size;
#pragma unroll
      for (int e = 0; e < V::size; ++e) at[e] = group ? at[e] + sums[kw][e] : sums[kw][e];
    }
  }
  __syncthreads();
  constexpr int kChannels = kVectors * V::size;
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  for (int i = thread; i < kTaps * kChannels; i += blockDim.x * blockDim.y * blockDim.z) {
    const int channel = channel_block * kChannels + i % kChannels;
    if (channel < g.channels && (i < kernel * kernel * kChannels || a.with_bias))
      a.sum(slice * grid.strips + strip, i / kChannels, channel) = total[i];
  }
}

template <class T, int kernel, int stride>
void launch(const WeightGrad& a, cudaStream_t stream) {
  using S = Step<kernel, stride>;
  if (a.only_asked) return;
  const Conv2d& g = a.g;
  Grid grid;
  grid.strips = int(ceil_div(g.out_w, kStripWidth));
  grid.columns = int(ceil_div(g.out_w < kStripWidth ? g.out_w : kStripWidth, kAcross));
  grid.channel_blocks = int(ceil_div(g.channels, kVectors * Vec<T>::size));
  const int slices = a.parts / grid.strips;
  grid.slice_rows = int(ceil_div(g.batch * g.out_h, slices));
  const int bytes = RowRing<T, S::kInputCapacity>::bytes(S::width(grid.columns)) +
                    RowRing<T, S::kGradCapacity>::bytes(grid.columns * kAcross);
  allow_shared_memory(&weight_grad_nhwc_kernel<T, kernel, stride>, bytes);
  const unsigned blocks = unsigned(slices) * grid.strips * grid.channel_blocks;
  weight_grad_nhwc_kernel<T, kernel, stride>
      <<<dim3(blocks), dim3(kVectors, kernel + a.with_bias, S::kGroups), bytes, stream>>>(a, grid);
}

}  // namespace

bool weight_grad_nhwc(const WeightGrad& a, Dtype dtype, cudaStream_t stream) {
  const Conv2d& g = a.g;
  if (!g.nhwc || g.channels % (dtype == Dtype::f32 ? 4 : 8) || !aligned_16(a.x, a.grad)) return false;
  if (g.batch * g.out_h > (1 << 30)) return false;  // rows are counted in 32 bits
  bool served = true;
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (is_plain(g, 3, 1)) return launch<T, 3, 1>(a, stream);
    if (is_plain(g, 3, 2)) return launch<T, 3, 2>(a, stream);
    if (is_plain(g, 5, 1)) return launch<T, 5, 1>(a, stream);
    if (is_plain(g, 5, 2)) return launch<T, 5, 2>(a, stream);
    if (is_plain(g, 7, 1)) return launch<T, 7, 1>(a, stream);
    if (is_plain(g, 7, 2)) return launch<T, 7, 2>(a, stream);
    served = false;
  });
  return served;
}

}  // namespace rkl::cuda
