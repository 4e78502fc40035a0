// Depthwise convolution of NCHW images, k = 3, 5 or 7, stride 1 or 2, its data gradient at stride 2, and the gradient
// of the filter.
//
// A block copies rows of a plane (several whole planes where they are small) into shared memory as one run.
// Neighbouring threads make neighbouring columns, so shared memory is read without bank conflicts; each makes several
// rows, so that a column of values that it has read serves them all.
#include "cuda/depthwise.h"
#include "cuda/plane_runs.cuh"

namespace rkl::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileBytes = 24 << 10;  // wanted for a block: four to eight of them fit on a multiprocessor
constexpr int kMostTileBytes = 96 << 10;

template <int kernel, int stride>
struct Column {
  static constexpr int kRows = kernel == 7 && stride == 1 ? 8 : 4;  // outputs of a thread, below each other
  static constexpr int kInputs = (kRows - 1) * stride + kernel;
};

constexpr int kPairRows = 4;  // pairs of rows that a thread of stride 2's data gradient makes

// How the work is cut: into chunks of a plane's output rows, or into groups of whole planes (images, for the filter).
struct Cut {
  int rows, chunks, planes, pitch;  // pitch: elements of shared memory for one run of inputs

  int input_rows(const Conv2d& g, int kernel, int stride) const {
    const int window = (rows - 1) * stride + kernel;
    return chunks == 1 || window > g.in_h ? int(g.in_h) : window;
  }
};

// thread_rows: outputs of a thread, of which a chunk is a multiple. False where not even those fit into shared memory.
bool cut(const Conv2d& g, int thread_rows, int kernel, int stride, int size, Cut& c) {
  const int64_t row_bytes = g.in_w * size, plane_bytes = g.in_h * row_bytes;
  c.rows = int(ceil_div(g.out_h, thread_rows)) * thread_rows;
  c.chunks = c.planes = 1;
  if (plane_bytes > kTileBytes) {
    const int64_t fit = (kTileBytes / row_bytes - kernel) / stride / thread_rows * thread_rows;
    c.rows = int(fit > thread_rows ? fit : thread_rows);
    c.chunks = int(ceil_div(g.out_h, c.rows));
    return ((c.rows - 1) * stride + kernel) * row_bytes <= kMostTileBytes;
  }
  // So many planes that every thread has a column.
  const int64_t columns = ceil_div(g.out_h, thread_rows) * g.out_w, wanted = ceil_div(kThreads, columns);
  const int64_t fit = kTileBytes / (plane_bytes + 32);
  c.planes = int(wanted < fit ? wanted : fit > 1 ? fit : 1);
  return true;
}

// A block's planes, output rows, and the input rows that are in shared memory, as one run.
struct Chunk {
  int64_t plane0;
  int planes, y0, rows, top, bottom;
  int64_t begin;
  int count;

  __device__ Chunk(const Conv2d& g, const Cut& cut, int kernel, int stride)
      : plane0(int64_t(blockIdx.x / cut.chunks) * cut.planes),
        planes(int(min(int64_t(cut.planes), g.batch * g.channels - plane0))),
        y0(int(blockIdx.x % cut.chunks) * cut.rows),
        rows(min(cut.rows, int(g.out_h) - y0)),
        // The rows that are in the image; of several planes, all rows of each.
        top(cut.chunks == 1 ? 0 : max(0, y0 * stride - g.padding_h)),
        bottom(cut.chunks == 1 ? int(g.in_h) : min(int(g.in_h), (y0 + rows - 1) * stride - g.padding_h + kernel)),
        begin((plane0 * g.in_h + top) * g.in_w),
        count(max(0, int((planes > 1 ? planes * g.in_h : bottom - top) * g.in_w))) {}

  // Copies the inputs and the planes' filters, and waits.
  template <int taps, class T>
  __device__ void load(const Depthwise& a, const PlaneRuns<T>& tile, float* filter) const {
    tile.load(begin, count, 1, 0, threadIdx.x, kThreads);
    cp_async_commit();
    for (int i = threadIdx.x; i < planes * taps; i += kThreads) {
      const int tap = i % taps;
      const int64_t c = (plane0 + i / taps) % a.g.channels;
      filter[i] = to_float(static_cast<const T*>(a.weight)[c * taps + (a.flipped ? taps - 1 - tap : tap)]);
    }
    cp_async_wait<0>();
    __syncthreads();
  }
};

template <class T, int kernel, int stride>
__global__ void __launch_bounds__(kThreads, 2) depthwise_nchw_kernel(Depthwise a, Cut cut) {
  using S = Column<kernel, stride>;
  constexpr int kTaps = kernel * kernel;
  extern __shared__ __align__(16) unsigned char memory[];
  const Conv2d& g = a.g;
  const int h = int(g.in_h), w = int(g.in_w), out_h = int(g.out_h), out_w = int(g.out_w);
  const Chunk chunk(g, cut, kernel, stride);
  const auto [plane0, planes, y0, rows, top, bottom, begin, count] = chunk;
  const PlaneRuns<T> tile{reinterpret_cast<T*>(memory), static_cast<const T*>(a.x), g.batch * g.channels * h * w,
                          cut.pitch};
  float* filter = reinterpret_cast<float*>(tile.tile + cut.pitch);  // [plane][tap]
  chunk.load<kTaps>(a, tile, filter);

  const int groups = (rows + S::kRows - 1) / S::kRows;
  const T* in = tile.run(0, begin);
  for (int item = threadIdx.x; item < planes * groups * out_w; item += kThreads) {
    const int x = item % out_w, group = item / out_w % groups, p = item / out_w / groups;
    const int row0 = y0 + group * S::kRows, in_y = row0 * stride - g.padding_h, in_x = x * stride - g.padding_w;
    const float bias = a.bias ? to_float(static_cast<const T*>(a.bias)[(plane0 + p) % g.channels]) : 0.f;
    float acc[S::kRows];
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) acc[r] = bias;
#pragma unroll
    for (int kw = 0; kw < kernel; ++kw) {
      if (in_x + kw < 0 || in_x + kw >= w) continue;
      const T* column = in + (p * h + in_y - top) * w + in_x + kw;
      float v[S::kInputs];
#pragma unroll
      for (int j = 0; j < S::kInputs; ++j) v[j] = in_y + j >= top && in_y + j < bottom ? to_float(column[j * w]) : 0.f;
#pragma unroll
      for (int kh = 0; kh < kernel; ++kh) {
        const float weight = filter[p * kTaps + kh * kernel + kw];
#pragma unroll
        for (int r = 0; r < S::kRows; ++r) acc[r] += v[r * stride + kh] * weight;
      }
    }
    T* y = static_cast<T*>(a.y) + ((plane0 + p) * out_h + row0) * out_w + x;
#pragma unroll
    for (int r = 0; r < S::kRows; ++r)
      if (row0 + r < y0 + rows) y[int64_t(r) * out_w] = from_float<T>(acc[r]);
  }
}

// The data gradient at stride 2. Rows and columns of dx, counted with the padding, go by two: a pair's even one meets
// the filter's even taps and its odd one the odd taps, with the same gradients. So it is a convolution of stride 1 of
// the gradient, `pairs`, with a filter of half the size and four outputs, and a.y has the rows and columns of `image`.
template <class T, int kernel>
__global__ void __launch_bounds__(kThreads, 2) stride2_grad_nchw_kernel(Depthwise a, Conv2d image, Cut cut) {
  constexpr int kTaps = kernel * kernel, kHalf = (kernel + 1) / 2, kInputs = kPairRows + kHalf - 1;
  extern __shared__ __align__(16) unsigned char memory[];
  const Conv2d& pairs = a.g;
  const int h = int(pairs.in_h), w = int(pairs.in_w), across = int(pairs.out_w);
  const Chunk chunk(pairs, cut, kHalf, 1);
  const auto [plane0, planes, y0, rows, top, bottom, begin, count] = chunk;
  const PlaneRuns<T> tile{reinterpret_cast<T*>(memory), static_cast<const T*>(a.x),
                          pairs.batch * pairs.channels * h * w, cut.pitch};
  float* filter = reinterpret_cast<float*>(tile.tile + cut.pitch);  // [plane][tap]
  chunk.load<kTaps>(a, tile, filter);

  const int groups = (rows + kPairRows - 1) / kPairRows;
  const T* in = tile.run(0, begin);
  for (int item = threadIdx.x; item < planes * groups * across; item += kThreads) {
    const int x = item % across, group = item / across % groups, p = item / across / groups;
    const int row0 = y0 + group * kPairRows, in_y = row0 - pairs.padding_h, in_x = x - pairs.padding_w;
    float acc[kPairRows][2][2] = {};  // [pair of rows][odd row][odd column]
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {  // from the window's left: the last taps come first
      if (in_x + j < 0 || in_x + j >= w) continue;
      const T* column = in + (p * h + in_y - top) * w + in_x + j;
      float v[kInputs];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) v[i] = in_y + i >= top && in_y + i < bottom ? to_float(column[i * w]) : 0.f;
#pragma unroll
      for (int kh = 0; kh < kernel; ++kh)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int kw = 2 * (kHalf - 1 - j) + odd;
          if (kw >= kernel) continue;
          const float weight = filter[p * kTaps + kh * kernel + kw];
#pragma unroll
          for (int r = 0; r < kPairRows; ++r) acc[r][kh % 2][odd] += v[r + kHalf - 1 - kh / 2] * weight;
        }
    }
    T* plane = static_cast<T*>(a.y) + (plane0 + p) * image.in_h * image.in_w;
#pragma unroll
    for (int r = 0; r < 2 * kPairRows; ++r) {
      const int y = 2 * (image.padding_h / 2 + row0) + r - image.padding_h;
      if (y < 0 || y >= image.in_h || row0 + r / 2 >= y0 + rows) continue;
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int column = 2 * (image.padding_w / 2 + x) + odd - image.padding_w;
        if (column >= 0 && column < image.in_w)
          plane[int64_t(y) * image.in_w + column] = from_float<T>(acc[r / 2][r % 2][odd]);
      }
    }
  }
}

// A block has one channel and every parts-th tile of it (chunk of rows, group of images); each thread keeps the sums of
// all taps for its columns.
template <class T, int kernel, int stride>
__global__ void __launch_bounds__(kThreads, 2) weight_grad_nchw_kernel(WeightGrad a, Cut cut, int grad_pitch) {
  constexpr int kRows = 4, kInputs = (kRows - 1) * stride + kernel, kTaps = kernel * kernel;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float warp_sums[kWarps][kTaps + 1];
  const Conv2d& g = a.g;
  const int h = int(g.in_h), w = int(g.in_w), out_h = int(g.out_h), out_w = int(g.out_w);
  const int64_t c = blockIdx.x % g.channels, in_image = g.channels * h * w, out_image = g.channels * out_h * out_w;
  const int part = int(blockIdx.x / g.channels);
  const PlaneRuns<T> in{reinterpret_cast<T*>(memory), static_cast<const T*>(a.x), g.batch * in_image, cut.pitch};
  const PlaneRuns<T> out{in.tile + cut.planes * cut.pitch, static_cast<const T*>(a.grad), g.batch * out_image,
                         grad_pitch};
  float sums[kTaps + 1] = {};  // the last one is the bias's

  const int64_t tiles = (g.batch + cut.planes - 1) / cut.planes * cut.chunks;
  for (int64_t t = part; t < tiles; t += a.parts) {
    const int64_t n = t / cut.chunks * cut.planes;
    const int images = int(min(int64_t(cut.planes), g.batch - n));
    const int y0 = int(t % cut.chunks) * cut.rows, rows = min(cut.rows, out_h - y0);
    const int top = cut.chunks == 1 ? 0 : max(0, y0 * stride - g.padding_h);
    const int bottom = cut.chunks == 1 ? h : min(h, (y0 + rows - 1) * stride - g.padding_h + kernel);
    const int64_t in_begin = n * in_image + (c * h + top) * w, out_begin = n * out_image + (c * out_h + y0) * out_w;
    in.load(in_begin, max(0, bottom - top) * w, images, in_image, threadIdx.x, kThreads);
    out.load(out_begin, rows * out_w, images, out_image, threadIdx.x, kThreads);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    const int groups = (rows + kRows - 1) / kRows;
    for (int item = threadIdx.x; item < images * groups * out_w; item += kThreads) {
      const int x = item % out_w, group = item / out_w % groups, p = item / out_w / groups;
      const int row0 = group * kRows, in_y = (y0 + row0) * stride - g.padding_h, in_x = x * stride - g.padding_w;
      const T* grads = out.run(p, out_begin + p * out_image) + row0 * out_w + x;
      const T* inputs = in.run(p, in_begin + p * in_image) + (in_y - top) * w + in_x;
      float d[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        d[r] = row0 + r < rows ? to_float(grads[r * out_w]) : 0.f;
        sums[kTaps] += d[r];
      }
#pragma unroll
      for (int kw = 0; kw < kernel; ++kw) {
        if (in_x + kw < 0 || in_x + kw >= w) continue;
        float v[kInputs];
#pragma unroll
        for (int j = 0; j < kInputs; ++j)
          v[j] = in_y + j >= top && in_y + j < bottom ? to_float(inputs[j * w + kw]) : 0.f;
#pragma unroll
        for (int kh = 0; kh < kernel; ++kh)
#pragma unroll
          for (int r = 0; r < kRows; ++r) sums[kh * kernel + kw] += d[r] * v[r * stride + kh];
      }
    }
    __syncthreads();  // the tile that the next copies overwrite has been read by all
  }

  // Lanes, then warps, in a fixed order.
#pragma unroll
  for (int tap = 0; tap <= kTaps; ++tap) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) sums[tap] += __shfl_down_sync(0xffffffffu, sums[tap], lanes);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][tap] = sums[tap];
  }
  __syncthreads();
  for (int tap = threadIdx.x; tap <= kTaps; tap += kThreads) {
    float sum = 0.f;
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp][tap];
    a.sum(part, tap, c) = sum;
  }
}

template <class T, int kernel, int stride>
bool launch(const Depthwise& a, cudaStream_t stream) {
  Cut c;
  if (!cut(a.g, Column<kernel, stride>::kRows, kernel, stride, sizeof(T), c)) return false;
  if (a.only_asked) return true;
  c.pitch = PlaneRuns<T>::pitch_for(c.planes * c.input_rows(a.g, kernel, stride) * int(a.g.in_w));
  const int bytes = c.pitch * int(sizeof(T)) + c.planes * kernel * kernel * int(sizeof(float));
  allow_shared_memory(&depthwise_nchw_kernel<T, kernel, stride>, bytes);
  const unsigned blocks = unsigned(ceil_div(a.g.batch * a.g.channels, c.planes) * c.chunks);
  depthwise_nchw_kernel<T, kernel, stride><<<dim3(blocks), dim3(kThreads), bytes, stream>>>(a, c);
  return true;
}

template <class T, int kernel>
bool launch_stride2_grad(const Depthwise& a, cudaStream_t stream) {
  constexpr int kHalf = (kernel + 1) / 2;
  const Conv2d& g = a.g;
  Conv2d pairs = g;
  pairs.in_h = g.out_h;
  pairs.in_w = g.out_w;
  pairs.out_h = (g.in_h + g.padding_h + 1) / 2 - g.padding_h / 2;
  pairs.out_w = (g.in_w + g.padding_w + 1) / 2 - g.padding_w / 2;
  pairs.padding_h = kHalf - 1 - g.padding_h / 2;
  pairs.padding_w = kHalf - 1 - g.padding_w / 2;
  Cut c;
  if (!cut(pairs, kPairRows, kHalf, 1, sizeof(T), c)) return false;
  if (a.only_asked) return true;
  c.pitch = PlaneRuns<T>::pitch_for(c.planes * c.input_rows(pairs, kHalf, 1) * int(pairs.in_w));
  const int bytes = c.pitch * int(sizeof(T)) + c.planes * kernel * kernel * int(sizeof(float));
  allow_shared_memory(&stride2_grad_nchw_kernel<T, kernel>, bytes);
  const unsigned blocks = unsigned(ceil_div(g.batch * g.channels, c.planes) * c.chunks);
  stride2_grad_nchw_kernel<T, kernel>
      <<<dim3(blocks), dim3(kThreads), bytes, stream>>>(Depthwise{pairs, a.x, a.weight, nullptr, a.y}, g, c);
  return true;
}

template <class T, int kernel, int stride>
bool launch(const WeightGrad& a, cudaStream_t stream) {
  const Conv2d& g = a.g;
  Cut c;
  if (!cut(g, 4, kernel, stride, sizeof(T), c)) return false;
  if (a.only_asked) return true;
  if (c.planes > g.batch) c.planes = int(g.batch);
  c.pitch = PlaneRuns<T>::pitch_for(c.input_rows(g, kernel, stride) * int(g.in_w));
  const int grad_pitch = PlaneRuns<T>::pitch_for(int((c.rows < g.out_h ? c.rows : g.out_h) * g.out_w));
  const int bytes = c.planes * (c.pitch + grad_pitch) * int(sizeof(T));
  allow_shared_memory(&weight_grad_nchw_kernel<T, kernel, stride>, bytes);
  weight_grad_nchw_kernel<T, kernel, stride>
      <<<dim3(unsigned(g.channels * a.parts)), dim3(kThreads), bytes, stream>>>(a, c, grad_pitch);
  return true;
}

template <class T, class Args>
bool launch_any(const Args& a, cudaStream_t stream) {
  if (is_plain(a.g, 3, 1)) return launch<T, 3, 1>(a, stream);
  if (is_plain(a.g, 3, 2)) return launch<T, 3, 2>(a, stream);
  if (is_plain(a.g, 5, 1)) return launch<T, 5, 1>(a, stream);
  if (is_plain(a.g, 5, 2)) return launch<T, 5, 2>(a, stream);
  if (is_plain(a.g, 7, 1)) return launch<T, 7, 1>(a, stream);
  if (is_plain(a.g, 7, 2)) return launch<T, 7, 2>(a, stream);
  return false;
}

}  // namespace

bool depthwise_nchw(const Depthwise& a, Dtype dtype, cudaStream_t stream) {
  if (a.g.nhwc || !aligned_16(a.x)) return false;
  bool served = false;
  by_type(dtype, [&](auto zero) { served = launch_any<decltype(zero)>(a, stream); });
  return served;
}

bool depthwise_nchw_stride2_grad(const Depthwise& a, Dtype dtype, cudaStream_t stream) {
  if (a.g.nhwc || !aligned_16(a.x)) return false;
  bool served = false;
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (is_plain(a.g, 3, 2)) served = launch_stride2_grad<T, 3>(a, stream);
    if (is_plain(a.g, 5, 2)) served = launch_stride2_grad<T, 5>(a, stream);
    if (is_plain(a.g, 7, 2)) served = launch_stride2_grad<T, 7>(a, stream);
  });
  return served;
}

bool weight_grad_nchw(const WeightGrad& a, Dtype dtype, cudaStream_t stream) {
  if (a.g.nhwc || !aligned_16(a.x, a.grad)) return false;
  bool served = false;
  by_type(dtype, [&](auto zero) { served = launch_any<decltype(zero)>(a, stream); });
  return served;
}

}  // namespace rkl::cuda
