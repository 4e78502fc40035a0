// Elementwise kernels: T-ReLU and its gradient, and what stands around a matrix product (bias, activation, derivative).
#pragma once
#include "cpu/simd/math.h"

namespace rkl::cpu::RKL_ISA {

// out[i] = f(a[i], b[i]). For functions of one argument a is passed as b, too.
template <class T, class F>
void map(const void* a, const void* b, void* out, int64_t n, F f) {
  constexpr int64_t kBlock = 1024;  // a multiple of a vector, so that threads meet between vectors
  torch::stable::parallel_for(0, ceil_div(n, kBlock), kGrain / kBlock, [=](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, last = std::min(end * kBlock, n);
    const T *from = static_cast<const T*>(a) + first, *other = static_cast<const T*>(b) + first;
    T* to = static_cast<T*>(out) + first;
    for_vectors(last - first, [=](int64_t i, int64_t count) {
      store_up_to(to + i, f(load_up_to(from + i, count), load_up_to(other + i, count)), count);
    });
  });
}

// These are not lambdas: a lambda without captures is a function as well, which GCC compiles for the baseline.
template <class T>
struct TRelu {
  Vec operator()(Vec x, Vec) const { return vtrelu(x, T{}); }
};
struct TReluBackward {
  Vec operator()(Vec grad, Vec y) const { return grad * trelu_derivative(y); }
};

template <class T>
void trelu(const void* x, void* y, int64_t n) {
  map<T>(x, x, y, n, TRelu<T>{});
}

template <class T>
void trelu_backward(const void* grad, const void* y, void* dx, int64_t n) {
  map<T>(grad, y, dx, n, TReluBackward{});
}

// out = act(z + bias) over rows of `columns` elements, `stride` elements apart. out may be z; bias may be null.
template <class T>
void finish_rows(const T* z, const T* bias, Activation act, T* out, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, z += stride, out += stride)
    for_vectors(columns, [=](int64_t c, int64_t count) {
      const Vec v = load_up_to(z + c, count);
      store_up_to(out + c, activate(act, bias ? v + load_up_to(bias + c, count) : v, T{}), count);
    });
}

template <class T>
void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels) {
  if (!bias) return map<T>(z, z, out, rows * channels, [=](Vec v, Vec) { return activate(act, v, T{}); });
  torch::stable::parallel_for(0, rows, kGrain / channels + 1, [=](int64_t begin, int64_t end) {
    const int64_t first = begin * channels;
    finish_rows(static_cast<const T*>(z) + first, static_cast<const T*>(bias), act, static_cast<T*>(out) + first,
                end - begin, channels, channels);
  });
}

template <class T>
void activation_backward(const void* grad, const void* values, Activation act, bool from_output, void* out, int64_t n) {
  map<T>(grad, values, out, n, [=](Vec g, Vec v) {
    const Vec d = from_output ? derivative_from_output(act, v) : derivative_from_input(act, v);
    return selects(act) ? select(d == 0.f, Vec{}, g * d) : g * d;
  });
}

template <class T>
void widen(const void* in, float* out, int64_t n) {
  const T* from = static_cast<const T*>(in);
  for_vectors(n, [&](int64_t i, int64_t count) { store_up_to(out + i, load_up_to(from + i, count), count); });
}

}  // namespace rkl::cpu::RKL_ISA
