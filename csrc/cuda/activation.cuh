// The activations of csrc/activation.h for results that are stored as T. In 16 bits T-ReLU uses the hardware's tanh,
// whose error of 2^-11 is no more than that of rounding to fp16, and an eighth of that of rounding to bf16. The
// accurate tanh takes so many instructions that a pass of T-ReLU ran at 88 % of a copy's speed; with the hardware's it
// runs at 99 % (measured on an H200).
#pragma once
#include "activation.h"
#include "cuda/ptx.cuh"

namespace rkl::cuda {

template <class T>
__device__ inline float activated(Activation act, float x) {
  if constexpr (sizeof(T) == 2) {
    if (act == Activation::trelu) return x > 0.f ? x : tanh_approx(x);
    if (act == Activation::silu) return __fdividef(x, 1.f + __expf(-x));  // accurate to a few ulp of fp32
  }
  return activate(act, x);
}

// Calls f with the activation as a function of a float, or does nothing if there is none. So one switch serves all
// values that a thread has at a time. short_ones: leaves out the code of activations that are not short (rows.h).
template <class T, bool short_ones = false, class F>
__device__ inline void with_activation(Activation act, F&& f) {
  switch (act) {
    case Activation::none:
      return;
    case Activation::relu:
      return f([](float x) { return activated<T>(Activation::relu, x); });
    case Activation::relu6:
      return f([](float x) { return activated<T>(Activation::relu6, x); });
    case Activation::trelu:
      return f([](float x) { return activated<T>(Activation::trelu, x); });
    case Activation::silu:
      return f([](float x) { return activated<T>(Activation::silu, x); });
    case Activation::gelu:
      if constexpr (!short_ones) f([](float x) { return activated<T>(Activation::gelu, x); });
  }
}

template <class T, bool short_ones = false, int n>
__device__ inline void activate_all(Activation act, float (&v)[n]) {
  with_activation<T, short_ones>(act, [&](auto activation) {
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = activation(v[i]);
  });
}

}  // namespace rkl::cuda
