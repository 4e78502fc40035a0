// Between the files of the depthwise family: what a launch is told, and the launches by layout. Each fast launch
// returns false, having done nothing, where it does not cover the case; depthwise.cu tries them in turn and ends with
// the general one, which covers all.
#pragma once
#include <cuda_runtime.h>

#include "geometry.h"

namespace rkl::cuda {

// y = x * weight + bias, or with `transposed` the gradient of that by x: then x is the gradient and y the result, and
// g still is the forward convolution. A `flipped` filter is read from its end to its beginning: what makes the gradient
// of a convolution of stride 1 a convolution too.
struct Depthwise {
  Conv2d g;
  const void *x, *weight, *bias;
  void* y;
  bool flipped = false;
};

// The gradient of the filter and, as one tap more, of the bias: sums over slices of the batch into the workspace.
struct WeightGrad {
  Conv2d g;
  const void *grad, *x;
  float* partial;      // (slices, taps + 1, channels)
  int64_t slice_rows;  // output rows of all images that a slice has; the last one may have fewer
  int slices;
  bool with_bias;
};

bool depthwise_nhwc(const Depthwise& a, Dtype dtype, cudaStream_t stream);
bool depthwise_nhwc_stride2_grad(const Depthwise& a, Dtype dtype, cudaStream_t stream);
bool weight_grad_nhwc(const WeightGrad& a, Dtype dtype, cudaStream_t stream);
bool depthwise_nchw(const Depthwise& a, Dtype dtype, cudaStream_t stream);
bool weight_grad_nchw(const WeightGrad& a, Dtype dtype, cudaStream_t stream);
void depthwise_general(const Depthwise& a, bool transposed, Dtype dtype, cudaStream_t stream);
void weight_grad_general(const WeightGrad& a, Dtype dtype, cudaStream_t stream);

// What the fast paths have in common: a square filter, one stride for both directions, no dilation.
inline bool is_plain(const Conv2d& g, int kernel, int stride) {
  return g.kernel_h == kernel && g.kernel_w == kernel && g.stride_h == stride && g.stride_w == stride &&
         g.dilation_h == 1 && g.dilation_w == 1;
}

template <class... P>
bool aligned_16(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace rkl::cuda
