// Data and filter gradient in one pass: NHWC images, k = 3, stride 1, padding 1.
//
// Apart, the two kernels read the output's gradient twice: four tensors moved, here three. Each pixel of the image
// meets the 3 x 3 gradients around it: times the filter they are its own gradient, times the pixel the filter's. So a
// block slides down its part of the batch as in weight_grad_nhwc.cu, with the gradient's rows and a halo in one ring
// and the image's in another, and what a thread has read of the gradient serves both. It has the sums of all taps, so
// only 4 channels: 8 would take all of its registers. Wider filters have too many sums, and too much arithmetic for
// bytes to decide (benchmarks/NOTES.md).
#include "cuda/depthwise.h"
#include "cuda/row_ring.cuh"

namespace rkl::cuda {
namespace {

constexpr int kKernel = 3, kTaps = kKernel * kKernel, kSums = kTaps + 1;  // the last one is the bias's
constexpr int kAcross = 4, kRows = 4;                                     // pixels of a thread, rows of a step
constexpr int kWindow = kRows + kKernel - 1;
constexpr int kMaxColumns = kStripWidth / kAcross;  // of threads across a strip

constexpr int ring_width(int columns) { return columns * kAcross + kKernel - 1; }

template <class T>
struct Step {
  using Quad = Vec<T, 4>;
  static constexpr int kShares = Vec<T>::size / Quad::size;  // threads that share a vector of 16 bytes
  static constexpr int kThreads = kVectors * kMaxColumns * kShares * kRows;
  static constexpr int kBlocks = 512 / kThreads;  // bounds the registers
  using Grads = RowRing<T, kWindow + kRows>;
  using Image = RowRing<T, 2 * kRows>;
};

struct Grid {
  int strips, columns, channel_blocks;  // columns: of threads
  int slice_rows;                       // rows of all images that a block has
};

template <class T>
__device__ inline void to_floats(const Vec<T, 4>& v, float (&out)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = to_float(v.v[e]);
}

// Adds up a channel's sums of all of the block's threads, in halves, so that the order does not depend on when a thread
// comes by; the first thread of each has the result. memory: of groups / 2 * kSums * 4 floats a thread of a group.
__device__ inline void add_groups(float (&sums)[kSums][4], float* memory, int group, int groups, int thread,
                                  int threads) {
  while (groups > 1) {
    const int half = (groups + 1) / 2;
    __syncthreads();  // what lies there has been read
    if (group >= half && group < groups) {
#pragma unroll
      for (int tap = 0; tap < kSums; ++tap)
#pragma unroll
        for (int e = 0; e < 4; ++e) memory[(((group - half) * kSums + tap) * 4 + e) * threads + thread] = sums[tap][e];
    }
    __syncthreads();
    if (group + half < groups) {
#pragma unroll
      for (int tap = 0; tap < kSums; ++tap)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[tap][e] += memory[((group * kSums + tap) * 4 + e) * threads + thread];
    }
    groups = half;
  }
}

// Row r of kAcross pixels from `column` on with the gradients around them: adds to their own gradients, and to the
// sums.
template <class T>
__device__ inline void meet(const Vec<T>* filter, const typename Step<T>::Grads& grads,
                            const typename Step<T>::Image& image, int r, int column, int share,
                            float (&out)[kAcross][4], float (&sums)[kSums][4]) {
  const auto quad = [&](const Vec<T>* v) { return reinterpret_cast<const typename Step<T>::Quad*>(v) + share; };
  float pixels[kAcross][4];
#pragma unroll
  for (int p = 0; p < kAcross; ++p) to_floats<T>(*quad(image.at(r, column + p)), pixels[p]);
#pragma unroll
  for (int i = 0; i < kKernel; ++i) {
    float taps[kKernel][4];
#pragma unroll
    for (int j = 0; j < kKernel; ++j) to_floats<T>(*quad(filter + (i * kKernel + j) * kVectors + threadIdx.x), taps[j]);
#pragma unroll
    for (int b = 0; b < kAcross + kKernel - 1; ++b) {
      float d[4];
      to_floats<T>(*quad(grads.at(r + i, column + b)), d);
#pragma unroll
      for (int p = 0; p < kAcross; ++p) {
        const int j = b - p;
        if (j < 0 || j >= kKernel) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          out[p][e] += d[e] * taps[j][e];
          sums[i * kKernel + j][e] += d[e] * pixels[p][e];
          if (i == 1 && j == 1) sums[kTaps][e] += d[e];
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(Step<T>::kThreads, Step<T>::kBlocks)
    backward_nhwc_kernel(WeightGrad a, const T* weight, T* dx, Grid grid) {
  using S = Step<T>;
  using V = Vec<T>;
  using Quad = typename S::Quad;
  extern __shared__ __align__(16) unsigned char memory[];
  V* filter = reinterpret_cast<V*>(memory);

  const Conv2d& g = a.g;
  const int strip = blockIdx.x % grid.strips, channel_block = blockIdx.x / grid.strips % grid.channel_blocks;
  const int slice = blockIdx.x / grid.strips / grid.channel_blocks;
  // The lanes of a half warp have the two shares of eight vectors, and so all banks.
  const int share = threadIdx.y % S::kShares, column = threadIdx.y / S::kShares * kAcross;
  const int c0 = channel_block * kVectors * V::size, vector = c0 + int(threadIdx.x) * V::size;
  const bool live = vector < g.channels;
  const int c = vector + share * Quad::size, x0 = strip * grid.columns * kAcross;
  const int h = int(g.in_h), w = int(g.in_w);
  typename S::Grads grads{filter + kTaps * kVectors, nullptr, live,   h,         w,
                          ring_width(grid.columns),  0,       x0 - 1, g.channels};
  typename S::Image image{grads.slots + (kWindow + kRows) * grads.width * kVectors,
                          nullptr,
                          live,
                          h,
                          w,
                          grid.columns * kAcross,
                          0,
                          x0,
                          g.channels};
  float sums[kSums][4] = {};

  load_filter<T, kTaps>(filter, weight, c0, int(g.channels), true);
  const int first = slice * grid.slice_rows, end = min(first + grid.slice_rows, int(g.batch) * h);
  int n = first / h, y0 = first - n * h;
  for (int row = first; row < end; ++n, y0 = 0) {  // one image, or the part of it that is in the slice, at a time
    const int rows = min(h - y0, end - row), steps = (rows + kRows - 1) / kRows;
    row += rows;
    const int64_t start = int64_t(n) * h * w * g.channels + (live ? vector : 0);
    grads.image = static_cast<const T*>(a.grad) + start;
    image.image = static_cast<const T*>(a.x) + start;
    grads.top = y0 - 1;
    image.top = y0;
    image.h = y0 + rows;  // the next slice's rows are not read
    grads.load(0, kWindow);
    image.load(0, kRows);
    cp_async_commit();
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) {
        grads.load(kWindow + step * kRows, kRows);
        image.load((step + 1) * kRows, kRows);
      }
      cp_async_commit();
      cp_async_wait<1>();  // all but the next step's rows
      __syncthreads();
      const int r = step * kRows + int(threadIdx.z);
      if (r < rows) {
        float out[kAcross][4] = {};
        meet<T>(filter, grads, image, r, column, share, out, sums);
        T* to = dx + ((int64_t(n) * h + y0 + r) * w + x0 + column) * g.channels + c;
#pragma unroll
        for (int p = 0; p < kAcross; ++p) {
          if (!live || x0 + column + p >= w) continue;
          Quad q;
#pragma unroll
          for (int e = 0; e < 4; ++e) q.v[e] = from_float<T>(out[p][e]);
          *reinterpret_cast<Quad*>(to + int64_t(p) * g.channels) = q;
        }
      }
      __syncthreads();  // the rows that the next loads overwrite have been read by all
    }
  }
  cp_async_wait<0>();

  const int across = threadIdx.y / S::kShares, thread = share * kVectors + threadIdx.x;
  const int group = across * kRows + threadIdx.z, groups = grid.columns * kRows;
  add_groups(sums, reinterpret_cast<float*>(memory), group, groups, thread, kVectors * S::kShares);
  if (group != 0 || !live) return;
#pragma unroll
  for (int tap = 0; tap < kSums; ++tap)
#pragma unroll
    for (int e = 0; e < 4; ++e)  // the window has the filter end first
      if (tap < kTaps || a.with_bias)
        a.sum(slice * grid.strips + strip, tap < kTaps ? kTaps - 1 - tap : kTaps, c + e) = sums[tap][e];
}

template <class T>
void launch(const WeightGrad& a, const void* weight, void* dx, cudaStream_t stream) {
  using S = Step<T>;
  const Conv2d& g = a.g;
  Grid grid;
  grid.strips = int(ceil_div(g.in_w, kStripWidth));
  grid.columns = int(ceil_div(g.in_w < kStripWidth ? g.in_w : kStripWidth, kAcross));
  grid.channel_blocks = int(ceil_div(g.channels, kVectors * Vec<T>::size));
  const int slices = a.parts / grid.strips;
  grid.slice_rows = int(ceil_div(g.batch * g.in_h, slices));
  const int bytes =
      kTaps * kVectors * 16 + S::Grads::bytes(ring_width(grid.columns)) + S::Image::bytes(grid.columns * kAcross);
  allow_shared_memory(&backward_nhwc_kernel<T>, bytes);
  const unsigned blocks = unsigned(slices) * grid.strips * grid.channel_blocks;
  backward_nhwc_kernel<T><<<dim3(blocks), dim3(kVectors, grid.columns * S::kShares, kRows), bytes, stream>>>(
      a, static_cast<const T*>(weight), static_cast<T*>(dx), grid);
}

}  // namespace

bool backward_nhwc(const WeightGrad& a, const void* weight, void* dx, Dtype dtype, cudaStream_t stream) {
  const Conv2d& g = a.g;
  if (!g.nhwc || g.channels % (dtype == Dtype::f32 ? 4 : 8) || !aligned_16(a.x, a.grad, dx)) return false;
  if (!is_plain(g, kKernel, 1) || g.padding_h != 1 || g.padding_w != 1) return false;
  if (g.batch * g.in_h > (1 << 30)) return false;  // rows are counted in 32 bits
  if (a.only_asked) return true;
  by_type(dtype, [&](auto zero) { launch<decltype(zero)>(a, weight, dx, stream); });
  return true;
}

}  // namespace rkl::cuda
