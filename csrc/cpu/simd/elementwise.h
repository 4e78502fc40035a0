// Elementwise kernels: T-ReLU and its gradient, and what stands around a matrix product (bias, activation, derivative).
#pragma once
#include "cpu/simd/math.h"

namespace rkl::cpu::RKL_ISA {

// out[i] = f(a[i], b[i]) for i in [begin, end); begin is a multiple of kLanes. b is a again for one-argument functions.
template <class T, class F>
void map_range(const T* a, const T* b, T* out, int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(out + i, f(load(a + i), load(b + i)));
  if (i < end) store_some(out + i, f(load_some(a + i, end - i), load_some(b + i, end - i)), end - i);
}

template <class T, class F>
void map(const void* a, const void* b, void* out, int64_t n, F f) {
  const T *from = static_cast<const T*>(a), *other = static_cast<const T*>(b);
  T* to = static_cast<T*>(out);
  constexpr int64_t kBlock = 1024;  // threads meet at whole vectors
  torch::stable::parallel_for(0, ceil_div(n, kBlock), kGrain / kBlock, [=](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, last = end * kBlock < n ? end * kBlock : n;
    map_range(from, other, to, first, last, f);
  });
}

template <class T>
struct TRelu {
  Vec operator()(Vec x, Vec) const { return vtrelu(x, T{}); }
};

struct TReluBackward {
  Vec operator()(Vec grad, Vec y) const { return grad * trelu_derivative(y); }
};

inline void trelu(const void* x, void* y, int64_t n, Dtype dtype) {
  by_type(dtype, [&](auto zero) { map<decltype(zero)>(x, x, y, n, TRelu<decltype(zero)>{}); });
}

inline void trelu_backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype) {
  by_type(dtype, [&](auto zero) { map<decltype(zero)>(grad, y, dx, n, TReluBackward{}); });
}

inline void activation_backward(const void* grad, const void* values, Activation act, bool from_output, void* out,
                                int64_t n, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    map<decltype(zero)>(grad, values, out, n, [=](Vec g, Vec v) {
      const Vec d = from_output ? derivative_from_output(act, v) : derivative_from_input(act, v);
      return selects(act) ? select(d == 0.f, Vec{}, g * d) : g * d;
    });
  });
}

}  // namespace rkl::cpu::RKL_ISA
