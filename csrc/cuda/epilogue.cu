// What stands around a library's matrix product where the separable convolution is not fused: over dense rows of pixels
// by channels, one pass each.
#include "activation.h"
#include "cuda/element.cuh"
#include "cuda/kernels.h"

namespace rkl::cuda {
namespace {

constexpr int kThreads = 256;

// Calls f(elements a thread) with that of a 16-byte vector where it divides the count and all pointers, else with 1.
template <class T, class F>
void by_width(int64_t count, const void* a, const void* b, const void* c, F&& f) {
  const auto bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c);
  constexpr int size = Vec<T>::size;
  count % size == 0 && bits % 16 == 0 ? f(std::integral_constant<int, size>{}) : f(std::integral_constant<int, 1>{});
}

unsigned blocks_for(int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); }

template <class T, int width>
__global__ void __launch_bounds__(kThreads)
    bias_and_activation(const T* z, const T* bias, Activation act, T* out, int64_t n, int64_t channels) {
  using V = Vec<T, width>;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * width;
  if (at >= n) return;
  V v = *reinterpret_cast<const V*>(z + at);
  const V b = bias ? *reinterpret_cast<const V*>(bias + at % channels) : V{};
#pragma unroll
  for (int i = 0; i < width; ++i)
    v.v[i] = from_float<T>(activate(act, to_float(v.v[i]) + (bias ? to_float(b.v[i]) : 0.f)));
  *reinterpret_cast<V*>(out + at) = v;
}

template <class T, int width>
__global__ void __launch_bounds__(kThreads)
    times_slope(const T* grad, const T* values, Activation act, bool from_output, T* out, int64_t n) {
  using V = Vec<T, width>;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * width;
  if (at >= n) return;
  V v = *reinterpret_cast<const V*>(grad + at);
  const V value = *reinterpret_cast<const V*>(values + at);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const float x = to_float(value.v[i]);
    v.v[i] = from_float<T>(to_float(v.v[i]) * (from_output ? slope_from_output(act, x) : slope_from_input(act, x)));
  }
  *reinterpret_cast<V*>(out + at) = v;
}

// Sums over rows in two stages, each in a fixed order: 32 columns by a slice of the rows a block, then over the slices.
constexpr int kColumns = 32, kLanes = kThreads / kColumns, kRowsOfSlice = 512, kMaxSlices = 1024;

int64_t slices_of(int64_t rows) {
  const int64_t slices = (rows + kRowsOfSlice - 1) / kRowsOfSlice;
  return slices < kMaxSlices ? slices : kMaxSlices;
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_rows(const T* matrix, float* partial, int64_t rows, int64_t channels) {
  __shared__ float sums[kThreads];
  const int lane = threadIdx.x / kColumns;
  const int64_t c = int64_t(blockIdx.y) * kColumns + threadIdx.x % kColumns;
  const int64_t of_slice = (rows + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * of_slice;
  float sum = 0.f;
  if (c < channels)
    for (int64_t r = begin + lane; r < rows && r < begin + of_slice; r += kLanes)
      sum += to_float(matrix[r * channels + c]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane || c >= channels) return;
  for (int l = 1; l < kLanes; ++l) sum += sums[l * kColumns + threadIdx.x];
  partial[blockIdx.x * channels + c] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_slices(const float* partial, int64_t slices, T* out, int64_t channels) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= channels) return;
  float sum = 0.f;
  for (int64_t s = 0; s < slices; ++s) sum += partial[s * channels + c];
  out[c] = from_float<T>(sum);
}

}  // namespace

void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels, Dtype dtype,
              cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    by_width<T>(channels, z, bias, out, [&](auto size) {
      constexpr int width = decltype(size)::value;
      const int64_t n = rows * channels;
      bias_and_activation<T, width><<<dim3(blocks_for(n / width)), dim3(kThreads), 0, stream>>>(
          static_cast<const T*>(z), static_cast<const T*>(bias), act, static_cast<T*>(out), n, channels);
    });
  });
}

void slope(const void* grad, const void* values, Activation act, bool from_output, void* out, int64_t n, Dtype dtype,
           cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    by_width<T>(n, grad, values, out, [&](auto size) {
      constexpr int width = decltype(size)::value;
      times_slope<T, width><<<dim3(blocks_for(n / width)), dim3(kThreads), 0, stream>>>(
          static_cast<const T*>(grad), static_cast<const T*>(values), act, from_output, static_cast<T*>(out), n);
    });
  });
}

int64_t column_sums_workspace(int64_t rows, int64_t channels) { return slices_of(rows) * channels; }

void column_sums(const void* matrix, void* out, int64_t rows, int64_t channels, float* workspace, Dtype dtype,
                 cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t slices = slices_of(rows);
    const dim3 grid(unsigned(slices), unsigned((channels + kColumns - 1) / kColumns));
    sum_rows<T><<<grid, dim3(kThreads), 0, stream>>>(static_cast<const T*>(matrix), workspace, rows, channels);
    sum_slices<T>
        <<<dim3(blocks_for(channels)), dim3(kThreads), 0, stream>>>(workspace, slices, static_cast<T*>(out), channels);
  });
}

}  // namespace rkl::cuda
