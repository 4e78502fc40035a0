// The steps around a library's matrix product where the separable convolution is not fused. Each is one pass over dense
// rows of pixels by channels.
#include <algorithm>

#include "cuda/activation.cuh"
#include "cuda/add_parts.cuh"
#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/kernels.h"

namespace rkl::cuda {
namespace {

constexpr int kThreads = 256;

// Calls f(elements of a thread): those of a 16-byte vector where it divides the count and all pointers, else 1.
template <class T, class F>
void by_width(int64_t count, const void* a, const void* b, const void* c, F&& f) {
  constexpr int size = 16 / sizeof(T);
  const bool wide = count % size == 0 && aligned_16(a, b, c);
  wide ? f(std::integral_constant<int, size>{}) : f(std::integral_constant<int, 1>{});
}

int64_t blocks_for(int64_t threads) { return ceil_div(threads, kThreads); }

// Calls f(first element, elements) for pieces so small that offsets in them have 32 bits (a remainder of 64 bits costs
// as much as the rest of a kernel). A piece has whole rows, or a part of one row that is too large.
template <class F>
void by_pieces(int64_t rows, int64_t channels, F&& f) {
  constexpr int64_t kMost = int64_t(1) << 31;
  const bool whole = channels <= kMost;
  const int64_t most = whole ? kMost / channels * channels : kMost, all = rows * channels;
  for (int64_t first = 0, n; first < all; first += n) {
    n = std::min(most, whole ? all - first : channels - first % channels);
    f(first, unsigned(n));
  }
}

template <class T, int width>
__device__ inline void load(const T* from, float (&v)[width]) {
  if constexpr (width == 1)
    v[0] = to_float(*from);
  else
    unpack<T>(*reinterpret_cast<const uint4*>(from), v);
}
template <class T, int width>
__device__ inline void store(T* to, const float (&v)[width]) {
  if constexpr (width == 1)
    *to = from_float<T>(v[0]);
  else
    *reinterpret_cast<uint4*>(to) = pack<T>(v);
}
// Loads from any address: as a vector where it is aligned.
template <class T, int width>
__device__ inline void load_any(const T* from, bool aligned, float (&v)[width]) {
  if (aligned) return load(from, v);
#pragma unroll
  for (int i = 0; i < width; ++i) v[i] = to_float(from[i]);
}

// Vectors of a thread. All loads are issued before the first is used: with one vector a thread, a pass took 64 us where
// a copy takes 44 (728 channels, 32 x 19^2 px, bf16, H100).
constexpr int kEach = 4;

// step: how many channels a thread's next vector lies after the one before, modulo the channels. The bias may begin
// anywhere, as a view into one buffer of all parameters does.
template <class T, int width>
__global__ void __launch_bounds__(kThreads) bias_and_activation(const T* z, const T* bias, Activation act, T* out,
                                                                unsigned n, unsigned channels, unsigned step) {
  const unsigned first = (blockIdx.x * kThreads * kEach + threadIdx.x) * width;
  float v[kEach][width] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (const unsigned at = first + i * kThreads * width; at < n) load(z + at, v[i]);
  unsigned channel = bias ? first % channels : 0;
  const bool aligned = reinterpret_cast<uintptr_t>(bias) % 16 == 0;
#pragma unroll
  for (int i = 0; i < kEach && bias; ++i) {
    float b[width];
    load_any(bias + channel, aligned, b);
#pragma unroll
    for (int e = 0; e < width; ++e) v[i][e] += b[e];
    channel += step;
    if (channel >= channels) channel -= channels;
  }
  activate_all<T>(act, reinterpret_cast<float (&)[kEach * width]>(v));
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (const unsigned at = first + i * kThreads * width; at < n) store(out + at, v[i]);
}

// The same for NCHW images, where a plane has one bias. channel: the first plane's.
template <class T, int width>
__global__ void __launch_bounds__(kThreads)
    plane_bias_and_activation(const T* z, const T* bias, Activation act, T* out, unsigned n, unsigned plane,
                              unsigned channel, unsigned channels) {
  const unsigned at = (blockIdx.x * kThreads + threadIdx.x) * width;
  if (at >= n) return;
  float v[width];
  load(z + at, v);
  const float b = to_float(bias[(channel + at / plane) % channels]);
#pragma unroll
  for (int i = 0; i < width; ++i) v[i] += b;
  activate_all<T>(act, v);
  store(out + at, v);
}

template <class T, int width>
__global__ void __launch_bounds__(kThreads)
    times_derivative(const T* grad, const T* values, Activation act, bool from_output, T* out, unsigned n) {
  const unsigned at = (blockIdx.x * kThreads + threadIdx.x) * width;
  if (at >= n) return;
  float v[width], x[width];
  load(grad + at, v);
  load(values + at, x);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const float d = from_output ? derivative_from_output(act, x[i]) : derivative_from_input(act, x[i]);
    v[i] = selects(act) && d == 0.f ? 0.f : v[i] * d;
  }
  store(out + at, v);
}

// Sums over rows in two stages, each in a fixed order: a block sums 32 columns over a slice of rows, then slices are
// added. Columns lie along the grid's x, which takes more blocks: a filter's gradient has one for each element.
constexpr int kColumns = 32, kLanes = kThreads / kColumns, kRowsOfSlice = 512, kMaxSlices = 1024;

int64_t slices_of(int64_t rows) {
  const int64_t slices = ceil_div(rows, kRowsOfSlice);
  return slices < kMaxSlices ? slices : kMaxSlices;
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_rows(const T* matrix, float* partial, int64_t rows, int64_t channels) {
  __shared__ float sums[kThreads];
  const int lane = threadIdx.x / kColumns;
  const int64_t c = int64_t(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const int64_t of_slice = (rows + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * of_slice;
  float sum = 0.f;
  if (c < channels)
    for (int64_t r = begin + lane; r < rows && r < begin + of_slice; r += kLanes)
      sum += to_float(matrix[r * channels + c]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane || c >= channels) return;
  for (int l = 1; l < kLanes; ++l) sum += sums[l * kColumns + threadIdx.x];
  partial[blockIdx.y * channels + c] = sum;
}

// For NCHW images: a warp sums a slice of a plane.
constexpr int kPixelsOfSlice = 4096;

int64_t plane_slices(int64_t plane) {
  const int64_t slices = ceil_div(plane, kPixelsOfSlice);
  return slices < kMaxSlices ? slices : kMaxSlices;
}

// partial: (slices, planes).
template <class T>
__global__ void __launch_bounds__(kThreads) sum_planes(const T* image, float* partial, int64_t planes, int64_t plane) {
  const int64_t number = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (number >= planes) return;  // the whole warp leaves
  const int64_t of_slice = (plane + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * of_slice;
  const int64_t end = min(plane, begin + of_slice);
  float sum = 0.f;
  for (int64_t i = begin + threadIdx.x % 32; i < end; i += 32) sum += to_float(image[number * plane + i]);
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) partial[blockIdx.y * planes + number] = sum;
}

template <class T>
struct Columns {
  T* out;
  __device__ T* operator()(int64_t c) const { return out + c; }
};

}  // namespace

void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels, Dtype dtype,
              cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    by_width<T>(channels, z, out, nullptr, [&](auto size) {
      constexpr int width = decltype(size)::value;
      by_pieces(rows, channels, [&](int64_t first, unsigned n) {
        // All channels, or fewer where the piece is a part of one row.
        const unsigned across = unsigned(std::min<int64_t>(channels, n));
        const T* biases = bias ? static_cast<const T*>(bias) + first % channels : nullptr;
        bias_and_activation<T, width>
            <<<grid("bias_and_activation", blocks_for(ceil_div(n / width, kEach))), dim3(kThreads), 0, stream>>>(
                static_cast<const T*>(z) + first, biases, act, static_cast<T*>(out) + first, n, across,
                kThreads * width % across);
      });
    });
  });
  check_launch("bias_and_activation");
}

void plane_epilogue(const void* z, const void* bias, Activation act, void* out, int64_t images, int64_t channels,
                    int64_t plane, Dtype dtype, cudaStream_t stream) {
  if (!bias) return epilogue(z, nullptr, act, out, images * channels, plane, dtype, stream);
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    by_width<T>(plane, z, out, nullptr, [&](auto size) {
      constexpr int width = decltype(size)::value;
      by_pieces(images * channels, plane, [&](int64_t first, unsigned n) {
        plane_bias_and_activation<T, width>
            <<<grid("plane_bias_and_activation", blocks_for(n / width)), dim3(kThreads), 0, stream>>>(
                static_cast<const T*>(z) + first, static_cast<const T*>(bias), act, static_cast<T*>(out) + first, n,
                unsigned(std::min<int64_t>(plane, n)), unsigned(first / plane % channels), unsigned(channels));
      });
    });
  });
  check_launch("plane_bias_and_activation");
}

void activation_backward(const void* grad, const void* values, Activation act, bool from_output, void* out, int64_t n,
                         Dtype dtype, cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    by_width<T>(n, grad, values, out, [&](auto size) {
      constexpr int width = decltype(size)::value;
      by_pieces(n / width, width, [&](int64_t first, unsigned count) {
        times_derivative<T, width><<<grid("times_derivative", blocks_for(count / width)), dim3(kThreads), 0, stream>>>(
            static_cast<const T*>(grad) + first, static_cast<const T*>(values) + first, act, from_output,
            static_cast<T*>(out) + first, count);
      });
    });
  });
  check_launch("times_derivative");
}

int64_t column_sums_workspace(int64_t rows, int64_t channels) { return slices_of(rows) * channels; }

void column_sums(const void* matrix, void* out, int64_t rows, int64_t channels, float* workspace, Dtype dtype,
                 cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t slices = slices_of(rows);
    sum_rows<T><<<grid("sum_rows", ceil_div(channels, kColumns), slices), dim3(kThreads), 0, stream>>>(
        static_cast<const T*>(matrix), workspace, rows, channels);
    launch_add_parts<T>(workspace, int(slices), channels, Columns<T>{static_cast<T*>(out)}, stream);
  });
  check_launch("sum_rows");
}

int64_t plane_sums_workspace(int64_t images, int64_t channels, int64_t plane) {
  return plane_slices(plane) * images * channels;
}

void plane_sums(const void* image, void* out, int64_t images, int64_t channels, int64_t plane, float* workspace,
                Dtype dtype, cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t planes = images * channels, slices = plane_slices(plane);
    sum_planes<T><<<grid("sum_planes", ceil_div(planes, kThreads / 32), slices), dim3(kThreads), 0, stream>>>(
        static_cast<const T*>(image), workspace, planes, plane);
    launch_add_parts<T>(workspace, int(slices * images), channels, Columns<T>{static_cast<T*>(out)}, stream);
  });
  check_launch("sum_planes");
}

}  // namespace rkl::cuda
