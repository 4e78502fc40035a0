// The operators on a GPU: guards, outputs, layouts and the stream here, kernels in the .cu files.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
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

}  // namespace
}  // namespace rkl

STABLE_TORCH_LIBRARY_IMPL(rkl, CUDA, m) {
  using Cuda = rkl::TReluOps<rkl::CudaTRelu>;
  m.impl("trelu", TORCH_BOX(&Cuda::forward));
  m.impl("trelu_", TORCH_BOX(&Cuda::forward_));
  m.impl("trelu_backward", TORCH_BOX(&Cuda::backward));
}

RKL_PYTHON_MODULE(_C_cuda)
