// Between the files of the depthwise family: what a launch is told, and the launches by layout. Each fast launch
// returns false, having done nothing, where it does not cover the case; depthwise.cu tries them in turn and ends with
// the general one, which covers all. Where it is only asked whether it covers the case, it launches nothing either.
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
  bool flipped = false, only_asked = false;
};

// The gradient of the filter and, as one tap more, of the bias: a sum for each part of the batch into the workspace.
// What a part is, is the kernel's affair; each must be written, but for the bias where it is not wanted.
struct WeightGrad {
  Conv2d g;
  const void *grad, *x;
  float* partial;  // (parts, channels, taps + 1), or with channels_inside (parts, taps + 1, channels)
  int parts;
  bool with_bias;
  bool channels_inside;  // which of the two the kernel's threads write side by side
  bool only_asked = false;

  __host__ __device__ float& sum(int part, int tap, int64_t channel) const {
    const int64_t taps = g.kernel_h * g.kernel_w + 1;
    return partial[part * taps * g.channels + (channels_inside ? tap * g.channels + channel : channel * taps + tap)];
  }
};

// Columns of outputs that a block of the NHWC kernels has; parts are a multiple of the strips that a map has of them.
constexpr int kStripWidth = 16;

bool depthwise_nhwc(const Depthwise& a, Dtype dtype, cudaStream_t stream);
bool depthwise_nhwc_stride2_grad(const Depthwise& a, Dtype dtype, cudaStream_t stream);
bool weight_grad_nhwc(const WeightGrad& a, Dtype dtype, cudaStream_t stream);
bool depthwise_nchw(const Depthwise& a, Dtype dtype, cudaStream_t stream);
bool depthwise_nchw_stride2_grad(const Depthwise& a, Dtype dtype, cudaStream_t stream);
bool depthwise_toeplitz(const Depthwise& a, Dtype dtype, cudaStream_t stream);
bool weight_grad_nchw(const WeightGrad& a, Dtype dtype, cudaStream_t stream);
bool backward_nhwc(const WeightGrad& a, const void* weight, void* dx, Dtype dtype, cudaStream_t stream);
bool weight_grad_toeplitz(const WeightGrad& a, Dtype dtype, cudaStream_t stream);
int weight_grad_toeplitz_parts(const Conv2d& g, Dtype dtype);  // 0 where it does not cover the case
void depthwise_general(const Depthwise& a, bool transposed, Dtype dtype, cudaStream_t stream);
void weight_grad_general(const WeightGrad& a, Dtype dtype, cudaStream_t stream);

// What the fast paths have in common: a square filter, one stride for both directions, no dilation.
inline bool is_plain(const Conv2d& g, int kernel, int stride) {
  return g.kernel_h == kernel && g.kernel_w == kernel && g.stride_h == stride && g.stride_w == stride &&
         g.dilation_h == 1 && g.dilation_w == 1;
}

template <class... P>
bool aligned_16(P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0;
}

// Dynamic shared memory past 48 KiB must be asked for, kernel by kernel.
template <class K>
void allow_shared_memory(K* kernel, int bytes) {
  constexpr int kAlwaysAllowed = 48 << 10;
  if (bytes > kAlwaysAllowed)
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks that keep every multiprocessor of the current device busy.
inline int64_t blocks_wanted() {
  constexpr int kBlocksEach = 8;  // as many as the NHWC kernels have at once, by registers and shared memory
  int device = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return kBlocksEach * int64_t(multiprocessors);
}

}  // namespace rkl::cuda
