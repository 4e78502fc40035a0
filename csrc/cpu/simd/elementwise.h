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
  torch::stable::parallel_for(0, (n + kBlock - 1) / kBlock, kGrain / kBlock, [=](int64_t begin, int64_t end) {
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
      return g * (from_output ? derivative_from_output(act, v) : derivative_from_input(act, v));
    });
  });
}

// out = act(z + bias), a row of channels at a time.
inline void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels,
                     Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *in = static_cast<const T*>(z), *b = static_cast<const T*>(bias);
    T* to = static_cast<T*>(out);
    const auto finished = [=](Vec v, Vec with) { return activate(act, v + with, T{}); };
    torch::stable::parallel_for(0, rows, kGrain / channels + 1, [=](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* from = in + r * channels;
        T* row = to + r * channels;
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) store(row + c, finished(load(from + c), b ? load(b + c) : Vec{}));
        if (const int64_t rest = channels - c)
          store_some(row + c, finished(load_some(from + c, rest), b ? load_some(b + c, rest) : Vec{}), rest);
      }
    });
  });
}

}  // namespace rkl::cpu::RKL_ISA
