// Depthwise convolution of NHWC images, k = 3, 5 or 7, stride 1 or 2, and the gradient of stride 2 by its input.
//
// Bytes decide: a block owns 128 bytes of channels and a strip of columns and slides down the image, so that every
// input row of the strip is read once. Rows come by cp.async into a ring, the next step's while this step's are worked
// on. A thread makes several neighbouring outputs of 8 (fp32: 4) channels, so that what it reads from shared memory is
// used several times.
#include "cuda/depthwise.h"
#include "cuda/row_ring.cuh"

namespace rkl::cuda {
namespace {

constexpr int kMaxColumns = 4;  // threads beside each other across a strip

// The shape of a block's step: how many outputs a thread makes across and how many rows of threads there are; the
// window of input that they need.
template <int kernel, int stride>
struct Step {
  static constexpr int kAcross = kernel == 7 && stride == 1 ? 8 : 4;
  static constexpr int kRows = stride == 1 ? 4 : 2;
  static constexpr int kAdvance = kRows * stride;                // input rows from step to step
  static constexpr int kWindow = (kRows - 1) * stride + kernel;  // input rows of a step
  static constexpr int kCapacity = kWindow + kAdvance;           // with those of the next one
  static constexpr int kThreads = kVectors * kMaxColumns * kRows;
  static constexpr int kBlocks = (kernel == 7 && stride == 1 ? 384 : 512) / kThreads;  // bounds the registers
  static constexpr int width(int columns) { return (columns * kAcross - 1) * stride + kernel; }
};

// Where a block works: strips across fastest, so that neighbours that share columns run at about the same time.
struct Grid {
  int strips, chunks, channel_blocks, chunk_rows, columns;

  // rows, columns_of_outputs: of the map that the blocks tile.
  static Grid over(const Conv2d& g, int64_t rows, int64_t width, int across, int step_rows, int channels_a_block) {
    Grid grid;
    grid.columns = int(ceil_div(width, across) < kMaxColumns ? ceil_div(width, across) : kMaxColumns);
    grid.strips = int(ceil_div(width, across * grid.columns));
    grid.channel_blocks = int(ceil_div(g.channels, channels_a_block));
    // An image is cut into chunks of rows, each of which reads its halo again, only as far as the GPU must be filled.
    const int64_t blocks = g.batch * grid.channel_blocks * grid.strips, steps = ceil_div(rows, step_rows);
    const int64_t wanted = blocks_wanted(), chunks = blocks >= wanted ? 1 : ceil_div(wanted, blocks);
    grid.chunk_rows = int(ceil_div(steps, chunks < steps ? chunks : steps)) * step_rows;
    grid.chunks = int(ceil_div(rows, grid.chunk_rows));
    return grid;
  }
  dim3 blocks(const Conv2d& g) const { return dim3(unsigned(g.batch * channel_blocks * chunks * strips)); }

  struct Place {
    int strip, chunk, channel_block;
    int64_t image;
  };
  __device__ Place place() const {
    unsigned b = blockIdx.x;
    Place p;
    p.strip = int(b % strips), b /= strips;
    p.chunk = int(b % chunks), b /= chunks;
    p.channel_block = int(b % channel_blocks), b /= channel_blocks;
    p.image = b;
    return p;
  }
};

template <class T>
__device__ void set_bias(const Depthwise& a, int c, bool live, float (&bias)[Vec<T>::size]) {
#pragma unroll
  for (int e = 0; e < Vec<T>::size; ++e)
    bias[e] = a.bias && live ? to_float(static_cast<const T*>(a.bias)[c + e]) : 0.f;
}

template <class T, int kernel, int stride>
__global__ void __launch_bounds__(Step<kernel, stride>::kThreads, Step<kernel, stride>::kBlocks)
    depthwise_nhwc_kernel(Depthwise a, Grid grid) {
  using S = Step<kernel, stride>;
  using V = Vec<T>;
  constexpr int kInputs = (S::kAcross - 1) * stride + kernel;  // columns that a thread's outputs need
  extern __shared__ __align__(16) unsigned char memory[];
  V* filter = reinterpret_cast<V*>(memory);

  const Conv2d& g = a.g;
  const Grid::Place place = grid.place();
  const int c0 = place.channel_block * kVectors * V::size, c = c0 + threadIdx.x * V::size;
  const bool live = c < g.channels;
  const int x0 = (place.strip * grid.columns + threadIdx.y) * S::kAcross;  // of this thread's outputs
  const int y0 = place.chunk * grid.chunk_rows;
  const int rows = min(grid.chunk_rows, int(g.out_h) - y0), steps = (rows + S::kRows - 1) / S::kRows;
  const int64_t in_image = g.in_h * g.in_w * g.channels, out_image = g.out_h * g.out_w * g.channels;
  const RowRing<T, S::kCapacity> ring{filter + kernel * kernel * kVectors,
                                      static_cast<const T*>(a.x) + place.image * in_image + (live ? c : 0),
                                      live,
                                      int(g.in_h),
                                      int(g.in_w),
                                      S::width(grid.columns),
                                      y0 * stride - g.padding_h,
                                      place.strip * grid.columns * S::kAcross * stride - g.padding_w,
                                      g.channels};
  T* y = static_cast<T*>(a.y) + place.image * out_image + c;
  float bias[V::size];
  set_bias<T>(a, c, live, bias);

  ring.load(0, S::kWindow);
  cp_async_commit();
  load_filter<T, kernel * kernel>(filter, a.weight, c0, int(g.channels), a.flipped);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) ring.load(S::kWindow + step * S::kAdvance, S::kAdvance);
    cp_async_commit();
    cp_async_wait<1>();  // all but the next step's rows
    __syncthreads();
    float acc[S::kAcross][V::size];
#pragma unroll
    for (int p = 0; p < S::kAcross; ++p)
#pragma unroll
      for (int e = 0; e < V::size; ++e) acc[p][e] = bias[e];
#pragma unroll(kernel == 3 ? 3 : 1)
    for (int kh = 0; kh < kernel; ++kh) {
      const V* in = ring.at(step * S::kAdvance + threadIdx.z * stride + kh, threadIdx.y * S::kAcross * stride);
      float w[kernel][V::size];
#pragma unroll
      for (int kw = 0; kw < kernel; ++kw) to_floats(filter[(kh * kernel + kw) * kVectors + threadIdx.x], w[kw]);
#pragma unroll
      for (int j = 0; j < kInputs; ++j) {
        float v[V::size];
        to_floats(in[j * kVectors], v);
#pragma unroll
        for (int p = 0; p < S::kAcross; ++p) {
          const int kw = j - p * stride;
          if (kw < 0 || kw >= kernel) continue;
#pragma unroll
          for (int e = 0; e < V::size; ++e) acc[p][e] += v[e] * w[kw][e];
        }
      }
    }
    const int row = y0 + step * S::kRows + threadIdx.z;
    if (live && row < g.out_h) {
#pragma unroll
      for (int p = 0; p < S::kAcross; ++p)
        if (x0 + p < g.out_w)
          *reinterpret_cast<V*>(y + (int64_t(row) * g.out_w + x0 + p) * g.channels) = from_floats<T>(acc[p]);
    }
    __syncthreads();  // the rows that the next loads overwrite have been read by all
  }
  cp_async_wait<0>();
}

// The gradient by the input at stride 2. A gradient pixel o touched the inputs 2 o - padding + k; so inputs of equal
// parity see every second tap, and a patch of 2 x 2 inputs sees each tap once. In the grid of patches it is a
// convolution of stride 1 with a window of (kernel + 1) / 2: patch m has the inputs 2 m - padding and the next one, and
// reads the gradients m - t for tap pairs t.
template <int kernel>
struct PatchStep {
  static constexpr int kAcross = 2;  // patches a thread makes beside each other
  static constexpr int kRows = 4;    // of patches
  static constexpr int kTaps = (kernel + 1) / 2;
  static constexpr int kWindow = kRows + kTaps - 1, kCapacity = kWindow + kRows;
  static constexpr int kThreads = kVectors * kMaxColumns * kRows;
  static constexpr int width(int columns) { return columns * kAcross + kTaps - 1; }
};

template <class T, int kernel>
__global__ void __launch_bounds__(PatchStep<kernel>::kThreads) stride2_grad_nhwc_kernel(Depthwise a, Grid grid) {
  using S = PatchStep<kernel>;
  using V = Vec<T>;
  constexpr int kInputs = S::kAcross + S::kTaps - 1;
  extern __shared__ __align__(16) unsigned char memory[];
  V* filter = reinterpret_cast<V*>(memory);

  const Conv2d& g = a.g;
  const Grid::Place place = grid.place();
  const int c0 = place.channel_block * kVectors * V::size, c = c0 + threadIdx.x * V::size;
  const bool live = c < g.channels;
  const int m0 = (place.strip * grid.columns + threadIdx.y) * S::kAcross + g.padding_w / 2;  // this thread's patches
  const int y0 = place.chunk * grid.chunk_rows + g.padding_h / 2;
  const int patch_rows = int(g.in_h + g.padding_h + 1) / 2;  // the last patch row's number plus one
  const int rows = min(grid.chunk_rows, patch_rows - y0), steps = (rows + S::kRows - 1) / S::kRows;
  const int64_t in_image = g.in_h * g.in_w * g.channels, out_image = g.out_h * g.out_w * g.channels;
  const RowRing<T, S::kCapacity> ring{filter + kernel * kernel * kVectors,
                                      static_cast<const T*>(a.x) + place.image * out_image + (live ? c : 0),
                                      live,
                                      int(g.out_h),
                                      int(g.out_w),
                                      S::width(grid.columns),
                                      y0 - (S::kTaps - 1),
                                      place.strip * grid.columns * S::kAcross + g.padding_w / 2 - (S::kTaps - 1),
                                      g.channels};
  T* dx = static_cast<T*>(a.y) + place.image * in_image + c;

  ring.load(0, S::kWindow);
  cp_async_commit();
  load_filter<T, kernel * kernel>(filter, a.weight, c0, int(g.channels), false);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) ring.load(S::kWindow + step * S::kRows, S::kRows);
    cp_async_commit();
    cp_async_wait<1>();  // all but the next step's rows
    __syncthreads();
    // One row of the patches after the other: both at once would take twice the registers.
#pragma unroll 1
    for (int odd_h = 0; odd_h < 2; ++odd_h) {
      float acc[2 * S::kAcross][V::size] = {};
#pragma unroll 1
      for (int t = 0; 2 * t + odd_h < kernel; ++t) {
        const V* in = ring.at(step * S::kRows + threadIdx.z + S::kTaps - 1 - t, threadIdx.y * S::kAcross);
        float w[kernel][V::size];
#pragma unroll
        for (int kw = 0; kw < kernel; ++kw)
          to_floats(filter[((2 * t + odd_h) * kernel + kw) * kVectors + threadIdx.x], w[kw]);
#pragma unroll
        for (int j = 0; j < kInputs; ++j) {
          float v[V::size];
          to_floats(in[j * kVectors], v);
#pragma unroll
          for (int p = 0; p < 2 * S::kAcross; ++p) {
            const int kw = 2 * (p / 2 + S::kTaps - 1 - j) + p % 2;
            if (kw < 0 || kw >= kernel) continue;
#pragma unroll
            for (int e = 0; e < V::size; ++e) acc[p][e] += v[e] * w[kw][e];
          }
        }
      }
      const int row = 2 * (y0 + step * S::kRows + int(threadIdx.z)) - g.padding_h + odd_h;
      if (!live || row < 0 || row >= g.in_h || step * S::kRows + int(threadIdx.z) >= rows) continue;
#pragma unroll
      for (int p = 0; p < 2 * S::kAcross; ++p) {
        const int column = 2 * m0 - g.padding_w + p;
        if (column >= 0 && column < g.in_w)
          *reinterpret_cast<V*>(dx + (int64_t(row) * g.in_w + column) * g.channels) = from_floats<T>(acc[p]);
      }
    }
    __syncthreads();  // the rows that the next loads overwrite have been read by all
  }
  cp_async_wait<0>();
}

template <class T, int kernel, int stride>
void launch(const Depthwise& a, cudaStream_t stream) {
  using S = Step<kernel, stride>;
  if (a.only_asked) return;
  const Grid grid = Grid::over(a.g, a.g.out_h, a.g.out_w, S::kAcross, S::kRows, kVectors * Vec<T>::size);
  const int bytes = RowRing<T, S::kCapacity>::bytes(S::width(grid.columns)) + kernel * kernel * kVectors * 16;
  allow_shared_memory(&depthwise_nhwc_kernel<T, kernel, stride>, bytes);
  depthwise_nhwc_kernel<T, kernel, stride>
      <<<grid.blocks(a.g), dim3(kVectors, grid.columns, S::kRows), bytes, stream>>>(a, grid);
}

template <class T, int kernel>
void launch_stride2_grad(const Depthwise& a, cudaStream_t stream) {
  using S = PatchStep<kernel>;
  if (a.only_asked) return;
  const Conv2d& g = a.g;
  const int64_t rows = (g.in_h + g.padding_h + 1) / 2 - g.padding_h / 2;
  const int64_t width = (g.in_w + g.padding_w + 1) / 2 - g.padding_w / 2;
  const Grid grid = Grid::over(g, rows, width, S::kAcross, S::kRows, kVectors * Vec<T>::size);
  const int bytes = RowRing<T, S::kCapacity>::bytes(S::width(grid.columns)) + kernel * kernel * kVectors * 16;
  allow_shared_memory(&stride2_grad_nhwc_kernel<T, kernel>, bytes);
  stride2_grad_nhwc_kernel<T, kernel>
      <<<grid.blocks(g), dim3(kVectors, grid.columns, S::kRows), bytes, stream>>>(a, grid);
}

bool in_vectors(const Depthwise& a, Dtype dtype) {
  return a.g.nhwc && a.g.channels % (dtype == Dtype::f32 ? 4 : 8) == 0 && aligned_16(a.x, a.y);
}

}  // namespace

bool depthwise_nhwc(const Depthwise& a, Dtype dtype, cudaStream_t stream) {
  if (!in_vectors(a, dtype)) return false;
  bool served = true;
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (is_plain(a.g, 3, 1)) return launch<T, 3, 1>(a, stream);
    if (is_plain(a.g, 3, 2)) return launch<T, 3, 2>(a, stream);
    if (is_plain(a.g, 5, 1)) return launch<T, 5, 1>(a, stream);
    if (is_plain(a.g, 5, 2)) return launch<T, 5, 2>(a, stream);
    if (is_plain(a.g, 7, 1)) return launch<T, 7, 1>(a, stream);
    if (is_plain(a.g, 7, 2)) return launch<T, 7, 2>(a, stream);
    served = false;
  });
  return served;
}

bool depthwise_nhwc_stride2_grad(const Depthwise& a, Dtype dtype, cudaStream_t stream) {
  if (!in_vectors(a, dtype)) return false;
  bool served = true;
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (is_plain(a.g, 3, 2)) return launch_stride2_grad<T, 3>(a, stream);
    if (is_plain(a.g, 5, 2)) return launch_stride2_grad<T, 5>(a, stream);
    if (is_plain(a.g, 7, 2)) return launch_stride2_grad<T, 7>(a, stream);
    served = false;
  });
  return served;
}

}  // namespace rkl::cuda
