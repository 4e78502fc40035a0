// The activations' formulas and gradients, once, for the CPU, for CUDA and for the tests' emulator.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define RKL_HOST_DEVICE __host__ __device__
#else
#define RKL_HOST_DEVICE
#endif

namespace rkl {

// Numbers as in rkl_kernels/_checks.py: position in ACTIVATIONS plus one.
enum class Activation : int { none = 0, relu, relu6, trelu, silu, gelu };

// Equation (6): x above zero, tanh(x) below. Written with tanh, since the printed exponentials overflow. NaN fails the
// comparison and passes through tanh; -inf gives -1.
RKL_HOST_DEVICE inline float trelu(float x) { return x > 0.f ? x : tanhf(x); }

// dy/dx told from the output alone: 1 where y > 0, else 1 - tanh^2 = 1 - y^2.
RKL_HOST_DEVICE inline float trelu_derivative(float y) { return y > 0.f ? 1.f : 1.f - y * y; }

RKL_HOST_DEVICE inline float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

RKL_HOST_DEVICE inline float activate(Activation a, float x) {
  switch (a) {
    case Activation::relu:
      return x < 0.f ? 0.f : x;  // this way round, NaN stays NaN
    case Activation::relu6:
      return x < 0.f ? 0.f : (x > 6.f ? 6.f : x);
    case Activation::trelu:
      return trelu(x);
    case Activation::silu:
      return x * sigmoid(x);
    case Activation::gelu:
      return 0.5f * x * (1.f + erff(x * 0.70710678f));
    default:
      return x;
  }
}

// Whether the gradient is 0 where the derivative is, even times infinity: relu and relu6 select, as in PyTorch.
RKL_HOST_DEVICE inline bool selects(Activation a) { return a == Activation::relu || a == Activation::relu6; }

// The activation's derivative, from its output y. silu and gelu are not monotonic, so y does not tell theirs. A NaN
// lets the gradient pass, as in PyTorch.
RKL_HOST_DEVICE inline float derivative_from_output(Activation a, float y) {
  switch (a) {
    case Activation::relu:
      return y <= 0.f ? 0.f : 1.f;
    case Activation::relu6:
      return y <= 0.f || y >= 6.f ? 0.f : 1.f;
    case Activation::trelu:
      return trelu_derivative(y);
    default:
      return 1.f;
  }
}

// The activation's derivative, from its input x.
RKL_HOST_DEVICE inline float derivative_from_input(Activation a, float x) {
  switch (a) {
    case Activation::relu:
      return x <= 0.f ? 0.f : 1.f;
    case Activation::relu6:
      return x <= 0.f || x >= 6.f ? 0.f : 1.f;
    case Activation::trelu:
      return trelu_derivative(trelu(x));
    case Activation::silu: {
      const float s = sigmoid(x);
      return s * (1.f + x * (1.f - s));
    }
    case Activation::gelu:
      return 0.5f * (1.f + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
    default:
      return 1.f;
  }
}

}  // namespace rkl
