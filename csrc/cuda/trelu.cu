// T-ReLU on a GPU: one pass, 16 bytes a load and a store, nothing kept but the output.
#include "cuda/activation.cuh"
#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/kernels.h"

namespace rkl::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Forward {
  static constexpr bool two = false;
  __device__ float operator()(float x, float) const { return activated<T>(Activation::trelu, x); }
};

template <class T>
struct Backward {
  static constexpr bool two = true;
  __device__ float operator()(float y, float grad) const { return grad * trelu_derivative(y); }
};

// out[i] = f(a[i], b[i]), or f(a[i]) where f takes one argument: `vectors` whole vectors, then the tail one by one.
// out may be a or b: an element is read and then written by the same thread. What is read and written only once is
// streamed (__ldcs, __stcs), so that it does not displace what the cache holds.
template <class T, class F>
__global__ void __launch_bounds__(kThreads)
    elementwise(const T* a, const T* b, T* out, int64_t n, int64_t vectors, F f) {
  constexpr int size = 16 / sizeof(T);
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = thread; i < vectors; i += threads) {
    float x[size], with[size];
    const uint4 first = __ldcs(reinterpret_cast<const uint4*>(a) + i);
    unpack<T>(F::two ? __ldcs(reinterpret_cast<const uint4*>(b) + i) : first, with);
    unpack<T>(first, x);
#pragma unroll
    for (int k = 0; k < size; ++k) x[k] = f(x[k], with[k]);
    __stcs(reinterpret_cast<uint4*>(out) + i, pack<T>(x));
  }
  for (int64_t i = vectors * size + thread; i < n; i += threads) {
    const float x = to_float(a[i]);
    out[i] = from_float<T>(f(x, F::two ? to_float(b[i]) : x));
  }
}

template <template <class> class F>
void launch(const void* a, const void* b, void* out, int64_t n, Dtype dtype, cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t size = 16 / sizeof(T);
    // A view may begin anywhere: then every element goes the scalar way.
    const bool aligned = aligned_16(a, b, out);
    const int64_t vectors = aligned ? n / size : 0, work = aligned ? vectors + n % size : n;
    const int64_t blocks = ceil_div(work, kThreads);
    elementwise<T, F<T>><<<grid("elementwise", blocks < (1 << 20) ? blocks : 1 << 20), dim3(kThreads), 0, stream>>>(
        static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), n, vectors, F<T>{});
  });
  check_launch("trelu");
}

}  // namespace

void trelu(const void* x, void* y, int64_t n, Dtype dtype, cudaStream_t stream) {
  launch<Forward>(x, nullptr, y, n, dtype, stream);
}

void trelu_backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype, cudaStream_t stream) {
  launch<Backward>(y, grad, dx, n, dtype, stream);
}

}  // namespace rkl::cuda
