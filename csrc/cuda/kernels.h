// What csrc/cuda/ops_cuda.cpp calls: launches over dense device memory. No torch in here or in the .cu files, so that
// the tests' emulator compiles them alone.
#pragma once
#include <cuda_runtime.h>

#include "activation.h"
#include "geometry.h"

namespace rkl::cuda {

void trelu(const void* x, void* y, int64_t n, Dtype dtype, cudaStream_t stream);
void trelu_backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype, cudaStream_t stream);

// Over a dense matrix of rows by channels; out may be the first argument. out = act(z + bias), where bias may be null.
void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels, Dtype dtype,
              cudaStream_t stream);
// out = grad * act', told from the activation's output or its input.
void slope(const void* grad, const void* values, Activation act, bool from_output, void* out, int64_t n, Dtype dtype,
           cudaStream_t stream);
// workspace: so many floats as column_sums_workspace tells.
int64_t column_sums_workspace(int64_t rows, int64_t channels);
void column_sums(const void* matrix, void* out, int64_t rows, int64_t channels, float* workspace, Dtype dtype,
                 cudaStream_t stream);

// Separable convolution in one kernel, over NHWC images whose pointers are multiples of 16; the biases may be null.
// Only for shapes that it serves; pays: whether it is to be preferred to a depthwise kernel and a library's matrix
// product.
bool fused_separable_serves(const Conv2d& g, int64_t c_out, Dtype dtype);
bool fused_separable_pays(const Conv2d& g, int64_t c_out);
void fused_separable(const Conv2d& g, int64_t c_out, const void* x, const void* depthwise, const void* pointwise,
                     const void* depthwise_bias, const void* pointwise_bias, Activation inner, Activation activation,
                     void* y, Dtype dtype, cudaStream_t stream);
// The pointwise step's gradients and that of the depthwise output, which is made again: what is left for backward is
// depthwise's own. y may be null without an activation; each gradient may be null where it is not wanted. workspace: so
// many floats as fused_separable_backward_workspace tells.
bool fused_separable_backward_serves(const Conv2d& g, int64_t c_out, Activation inner, Activation activation,
                                     Dtype dtype);
bool fused_separable_backward_pays(const Conv2d& g, int64_t c_out, Activation activation);
int64_t fused_separable_backward_workspace(const Conv2d& g, int64_t c_out);
void fused_separable_backward(const Conv2d& g, int64_t c_out, const void* grad, const void* y, const void* x,
                              const void* depthwise, const void* pointwise, const void* depthwise_bias,
                              Activation inner, Activation activation, void* d_inner, void* d_pointwise,
                              void* d_pointwise_bias, float* workspace, Dtype dtype, cudaStream_t stream);

// y = x * weight + bias; bias may be null.
void depthwise(const Conv2d& g, const void* x, const void* weight, const void* bias, void* y, Dtype dtype,
               cudaStream_t stream);
// The gradients of image, filter and bias; each may be null where it is not wanted, and so may be what only the others
// are made of. workspace: so many floats as weight_grad_workspace tells, for filter and bias.
int64_t weight_grad_workspace(const Conv2d& g, Dtype dtype);
void depthwise_backward(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx, void* dweight,
                        void* dbias, float* workspace, Dtype dtype, cudaStream_t stream);

// Which kernels serve a call whose tensors begin at multiples of 16 bytes: of the forward, and of a backward that makes
// both gradients, the image's and the filter's.
enum class DepthwiseKernel : int { general, nhwc, nchw, tensor_cores, one_pass };
struct DepthwiseKernels {
  DepthwiseKernel forward, input_grad, weight_grad;
};
DepthwiseKernels depthwise_kernels(const Conv2d& g, Dtype dtype);

}  // namespace rkl::cuda
