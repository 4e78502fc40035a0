// T-ReLU on a GPU: one pass, 16 bytes a load and a store, nothing kept but the output.
#include "activation.h"
#include "cuda/element.cuh"
#include "cuda/kernels.h"

namespace rkl::cuda {
namespace {

constexpr int kThreads = 256;

struct Forward {
  __device__ float operator()(float x, float) const { return rkl::trelu(x); }
};

struct Backward {
  __device__ float operator()(float y, float grad) const { return grad * trelu_slope(y); }
};

// out[i] = f(a[i], b[i]); `vectors` of them whole, then the tail one by one. b is a again for one-argument functions.
// out may be a or b: every element is read before it is written, by the one thread that has it.
template <class T, class F>
__global__ void __launch_bounds__(kThreads)
    elementwise(const T* a, const T* b, T* out, int64_t n, int64_t vectors, F f) {
  using V = Vec<T>;
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  for (int64_t i = thread; i < vectors; i += threads) {
    const V va = reinterpret_cast<const V*>(a)[i], vb = reinterpret_cast<const V*>(b)[i];
    V r;
#pragma unroll
    for (int k = 0; k < V::size; ++k) r.v[k] = from_float<T>(f(to_float(va.v[k]), to_float(vb.v[k])));
    reinterpret_cast<V*>(out)[i] = r;
  }
  for (int64_t i = vectors * V::size + thread; i < n; i += threads)
    out[i] = from_float<T>(f(to_float(a[i]), to_float(b[i])));
}

template <class F>
void launch(const void* a, const void* b, void* out, int64_t n, Dtype dtype, cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t size = Vec<T>::size;
    // A view may begin anywhere: then every element goes the scalar way.
    const bool aligned =
        (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(out)) % 16 == 0;
    const int64_t vectors = aligned ? n / size : 0, work = aligned ? vectors + n % size : n;
    const int64_t blocks = (work + kThreads - 1) / kThreads;
    elementwise<T, F><<<dim3(unsigned(blocks < (1 << 20) ? blocks : 1 << 20)), dim3(kThreads), 0, stream>>>(
        static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), n, vectors, F{});
  });
}

}  // namespace

void trelu(const void* x, void* y, int64_t n, Dtype dtype, cudaStream_t stream) {
  launch<Forward>(x, x, y, n, dtype, stream);
}

void trelu_backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype, cudaStream_t stream) {
  launch<Backward>(y, grad, dx, n, dtype, stream);
}

}  // namespace rkl::cuda
