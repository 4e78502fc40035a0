// What depthwise.cu calls in the files of the kernel families: the launches, and their arguments. A family's launch
// takes a plan that the same family made (plan.h).
#pragma once
#include <cuda_runtime.h>

#include "activation.h"
#include "cuda/plan.h"

namespace rkl::cuda {

// y = act(x * weight + bias), where x and y are image and output of g; bias may be null. With Result::data_grad, x is
// the output's gradient and y the image's, without bias and activation.
struct Convolution {
  Conv2d g;
  const void *x, *weight, *bias;
  void* y;
  Activation act = Activation::none;
};

// The gradients of filter and bias: each part's sums go to `partial`, (parts, taps + 1, channels), where the last tap
// is the bias. Without with_bias its sums may be left unwritten. weight, dx: where one pass makes both gradients.
struct FilterGrad {
  Conv2d g;
  const void *grad, *x;
  float* partial;
  bool with_bias;
  const void* weight = nullptr;
  void* dx = nullptr;

  __host__ __device__ float& sum(int part, int tap, int64_t channel) const {
    return partial[(int64_t(part) * (g.kernel_h * g.kernel_w + 1) + tap) * g.channels + channel];
  }
};

void launch_rows(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_rows(Result result, const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_registers(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_registers(Result result, const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_planes(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_planes(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_toeplitz(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_toeplitz(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_general(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_general(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream);

}  // namespace rkl::cuda
