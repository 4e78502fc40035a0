// What csrc/cuda/ops_cuda.cpp calls beside plan.h and pointwise.h, and what the kernels' files call of one another:
// launches over dense device memory. No torch in here or in the .cu files, so that the tests' emulator compiles them
// alone.
#pragma once
#include <cuda_runtime.h>

#include "activation.h"
#include "cuda/plan.h"
#include "geometry.h"

namespace rkl::cuda {

void trelu(const void* x, void* y, int64_t n, Dtype dtype, cudaStream_t stream);
void trelu_backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype, cudaStream_t stream);

// Over a dense matrix of rows by channels; out may be the first argument. out = act(z + bias), where bias may be null.
void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels, Dtype dtype,
              cudaStream_t stream);
// The same over NCHW images of planes of `plane` pixels.
void plane_epilogue(const void* z, const void* bias, Activation act, void* out, int64_t images, int64_t channels,
                    int64_t plane, Dtype dtype, cudaStream_t stream);
// out = grad * act', from the activation's output or its input.
void activation_backward(const void* grad, const void* values, Activation act, bool from_output, void* out, int64_t n,
                         Dtype dtype, cudaStream_t stream);
// Each column's sum; workspace: as many floats as column_sums_workspace returns.
int64_t column_sums_workspace(int64_t rows, int64_t channels);
void column_sums(const void* matrix, void* out, int64_t rows, int64_t channels, float* workspace, Dtype dtype,
                 cudaStream_t stream);
// Each channel's sum over NCHW images; workspace: as many floats as plane_sums_workspace returns.
int64_t plane_sums_workspace(int64_t images, int64_t channels, int64_t plane);
void plane_sums(const void* image, void* out, int64_t images, int64_t channels, int64_t plane, float* workspace,
                Dtype dtype, cudaStream_t stream);

// Transposes dense NCHW images to NHWC, or back, where can_transpose returns true.
bool can_transpose(int64_t images, int64_t channels, int64_t pixels, Dtype dtype, const void* from);
void transpose(const void* from, void* to, bool to_nhwc, int64_t images, int64_t channels, int64_t pixels, Dtype dtype,
               cudaStream_t stream);

// Separable convolution in one kernel, over NHWC images; the biases may be null. The plan is plan_separable's, which is
// nullopt where no kernel serves and the steps run unfused. aligned: whether x begins at a multiple of 16 bytes; the
// pointwise filter must.
MaybePlan plan_separable(const Conv2d& g, int64_t c_out, Activation inner, Activation act, Dtype dtype, bool aligned,
                         const Device& device);
void fused_separable(const Plan& plan, const Conv2d& g, int64_t c_out, const void* x, const void* depthwise,
                     const void* pointwise, const void* depthwise_bias, const void* pointwise_bias, Activation inner,
                     Activation act, void* y, Dtype dtype, cudaStream_t stream);

// y = act(x * weight + bias); bias may be null.
void depthwise(const Conv2d& g, const void* x, const void* weight, const void* bias, Activation act, void* y,
               Dtype dtype, cudaStream_t stream);
// The gradients of image, filter and bias. Those that are not wanted are null, and so may be the inputs that only they
// need. The plan is plan_depthwise_backward's for the same call; workspace: as many floats as the plan tells.
BackwardPlan plan_depthwise_backward(const Conv2d& g, const void* grad, const void* x, const void* dx,
                                     const void* dweight, const void* dbias, Dtype dtype);
void depthwise_backward(const BackwardPlan& plan, const Conv2d& g, const void* grad, const void* x, const void* weight,
                        void* dx, void* dweight, void* dbias, float* workspace, Dtype dtype, cudaStream_t stream);

}  // namespace rkl::cuda
