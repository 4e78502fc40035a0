// The operators on a GPU: guards, outputs, layouts and the stream here, kernels in the .cu files.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#include "depthwise_op.h"
#include "module.h"
#include "trelu_op.h"

namespace rkl {
namespace {

// Makes the tensor's device current for the launches of one operator, and names the stream they go to.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& x) : guard(x.get_device_index()) {
    void* raw = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &raw));
    stream = static_cast<cudaStream_t>(raw);
  }
  ~OnDeviceOf() noexcept(false) { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

struct CudaTRelu {
  static void forward(const void* x, void* y, int64_t n, Dtype dtype, const Tensor& like) {
    cuda::trelu(x, y, n, dtype, OnDeviceOf(like).stream);
  }
  static void backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype, const Tensor& like) {
    cuda::trelu_backward(grad, y, dx, n, dtype, OnDeviceOf(like).stream);
  }
};

// Kernels of the convolutions, as DepthwiseOps takes them.
struct CudaConv {
  static void forward(const Conv2d& g, const void* x, const void* weight, const void* bias, Activation act, void* y,
                      Dtype dtype, const Tensor& like) {
    STD_TORCH_CHECK(act == Activation::none, "the CUDA depthwise kernels have no activation");
    cuda::depthwise(g, x, weight, bias, y, dtype, OnDeviceOf(like).stream);
  }
  static void backward(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx, void* dweight,
                       void* dbias, Dtype dtype, const Tensor& like) {
    const OnDeviceOf device(like);
    if (dx) cuda::depthwise_input_grad(g, grad, weight, dx, dtype, device.stream);
    if (!dweight && !dbias) return;
    const Tensor workspace =
        torch::stable::new_empty(like, {cuda::weight_grad_workspace(g)}, std::optional<ScalarType>(ScalarType::Float));
    cuda::depthwise_weight_grad(g, grad, x, dweight, dbias, static_cast<float*>(workspace.mutable_data_ptr()), dtype,
                                device.stream);
  }
};

}  // namespace
}  // namespace rkl

STABLE_TORCH_LIBRARY_IMPL(rkl, CUDA, m) {
  using Cuda = rkl::TReluOps<rkl::CudaTRelu>;
  m.impl("trelu", TORCH_BOX(&Cuda::forward));
  m.impl("trelu_", TORCH_BOX(&Cuda::forward_));
  m.impl("trelu_backward", TORCH_BOX(&Cuda::backward));
  using Depthwise = rkl::DepthwiseOps<rkl::CudaConv>;
  m.impl("depthwise_conv2d", TORCH_BOX(&Depthwise::forward));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&Depthwise::backward));
}

RKL_PYTHON_MODULE(_C_cuda)
