// Separable convolution on the CPU, both steps in one: depthwise rows that stay in cache feed the pointwise step.
#pragma once
#include "activation.h"
#include "geometry.h"

namespace rkl::cpu {

// A separable convolution over dense memory: depthwise_out = depthwise(x) + depthwise_bias,
// hidden = inner(depthwise_out), z = pointwise * hidden + pointwise_bias, y = outer(z). The pointwise filter is (C_out,
// C). The biases may be null. All images are NHWC, or all NCHW.
struct Separable {
  Conv2d g;
  int64_t c_out;
  Activation inner, outer;
  Dtype dtype;
  const void *x, *depthwise, *depthwise_bias, *pointwise, *pointwise_bias;
};

void separable_bands(const Separable& s, void* y);

// The gradients of the pointwise step and of the depthwise step's output (before its activation), each null where it is
// not wanted. y may be null where there is no outer activation.
struct Gradients {
  void *depthwise_out, *pointwise, *pointwise_bias;
};
void pointwise_backward_bands(const Separable& s, const void* grad, const void* y, const Gradients& wanted);

}  // namespace rkl::cpu
