// The operators on a GPU: guards, outputs, layouts and the stream here, kernels in the .cu files.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <initializer_list>

#include "cuda/kernels.h"
#include "depthwise_op.h"
#include "module.h"
#include "separable_op.h"
#include "trelu_op.h"

namespace rkl {
namespace {

// Makes the tensor's device current for the launches of one operator, and names the stream they go to.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& x) : guard(x.get_device_index()) {
    void* raw = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &raw));
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

Tensor workspace(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {n}, std::optional<ScalarType>(ScalarType::Float));
}
float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// Kernels of the convolutions, as DepthwiseOps takes them.
struct CudaConv {
  static void forward(const Conv2d& g, const void* x, const void* weight, const void* bias, Activation act, void* y,
                      Dtype dtype, const Tensor& like) {
    const OnDeviceOf device(like);
    cuda::depthwise(g, x, weight, bias, y, dtype, device.stream);
    if (act != Activation::none)
      cuda::epilogue(y, nullptr, act, y, g.batch * g.out_h * g.out_w, g.channels, dtype, device.stream);
  }
  static constexpr auto inner = forward;
  static void backward(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx, void* dweight,
                       void* dbias, Dtype dtype, const Tensor& like) {
    const OnDeviceOf device(like);
    const Tensor sums = workspace(like, dweight || dbias ? cuda::weight_grad_workspace(g, dtype) : 0);
    cuda::depthwise_backward(g, grad, x, weight, dx, dweight, dbias, floats(sums), dtype, device.stream);
  }
};

// And those around a library's matrix product, or in place of it: fused where the kernels serve the shape and the
// counts are for it.
struct CudaSeparable : CudaConv {
  static bool takes_planes(const Conv2d&, Dtype) { return false; }
  static void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels,
                       Dtype dtype, const Tensor& like) {
    cuda::epilogue(z, bias, act, out, rows, channels, dtype, OnDeviceOf(like).stream);
  }
  static void slope(const void* grad, const void* values, Activation act, bool from_output, void* out, int64_t rows,
                    int64_t channels, Dtype dtype, const Tensor& like) {
    cuda::slope(grad, values, act, from_output, out, rows * channels, dtype, OnDeviceOf(like).stream);
  }
  static Tensor pointwise(const SeparableCall& call, const Tensor& image, const Tensor& filter,
                          const std::optional<Tensor>& bias, Activation act) {
    return pointwise_by_matrix<CudaSeparable>(call, image, filter, bias, act);
  }
  static void filter_gradient(const SeparableCall&, const Tensor& dz, const Tensor& inner, const Tensor& out) {
    filter_gradient_by_matrix(dz, inner, out);
  }
  static bool filter_gradient_from_image(const SeparableCall&, const Tensor&, const Tensor&) { return false; }
  static void channel_sums(const SeparableCall& call, const Tensor& image, const Tensor& out) {
    const OnDeviceOf device(image);
    const Tensor sums = workspace(image, cuda::column_sums_workspace(call.rows, call.c_out));
    cuda::column_sums(image.const_data_ptr(), out.mutable_data_ptr(), call.rows, call.c_out, floats(sums), call.dtype,
                      device.stream);
  }

  static std::optional<Tensor> fused_forward(const SeparableCall& call, const std::optional<Tensor>& pointwise_bias) {
    const Conv2d& g = call.g;
    const void *x = call.x.const_data_ptr(), *pointwise = call.pointwise.const_data_ptr();
    if (!vectors({x, pointwise}) || !cuda::fused_separable_serves(g, call.c_out, call.dtype) ||
        !cuda::fused_separable_pays(g, call.c_out))
      return std::nullopt;
    Tensor y = empty_image(call.x, g.batch, call.c_out, g.out_h, g.out_w, true);
    const OnDeviceOf device(call.x);
    cuda::fused_separable(g, call.c_out, x, call.depthwise.const_data_ptr(), pointwise,
                          data_or_null(call.depthwise_bias), data_or_null(pointwise_bias), call.inner_act, call.act,
                          y.mutable_data_ptr(), call.dtype, device.stream);
    return y;
  }

  static bool fused_backward(const SeparableCall& call, const Tensor& grad, const std::optional<Tensor>& y,
                             const PointwiseGradients& wanted) {
    const Conv2d& g = call.g;
    const auto to = [](Tensor* t) { return t ? t->mutable_data_ptr() : nullptr; };
    const void *x = call.x.const_data_ptr(), *pointwise = call.pointwise.const_data_ptr();
    if (!vectors({x, pointwise, grad.const_data_ptr(), data_or_null(y)}) ||
        !cuda::fused_separable_backward_serves(g, call.c_out, call.inner_act, call.act, call.dtype) ||
        !cuda::fused_separable_backward_pays(g, call.c_out, call.act))
      return false;
    if (wanted.inner) *wanted.inner = empty_image(call.x, g.batch, g.channels, g.out_h, g.out_w, true);
    const OnDeviceOf device(call.x);
    const Tensor sums = workspace(call.x, cuda::fused_separable_backward_workspace(g, call.c_out));
    cuda::fused_separable_backward(g, call.c_out, grad.const_data_ptr(), data_or_null(y), x,
                                   call.depthwise.const_data_ptr(), pointwise, data_or_null(call.depthwise_bias),
                                   call.inner_act, call.act, to(wanted.inner), to(wanted.pointwise), to(wanted.bias),
                                   floats(sums), call.dtype, device.stream);
    return true;
  }

 private:
  // Whether 16-byte copies may begin at all of these; a view may begin anywhere.
  static bool vectors(std::initializer_list<const void*> pointers) {
    return std::all_of(pointers.begin(), pointers.end(),
                       [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
  }
};

// The numbers of a Conv2d, in its order.
Conv2d conv2d_of(const std::vector<int64_t>& geometry, bool nhwc) {
  STD_TORCH_CHECK(geometry.size() == 14, "geometry must have 14 numbers, got ", geometry.size());
  const auto n = [&](int i) { return geometry[i]; };
  const auto small = [&](int i) { return int(geometry[i]); };
  return {n(0),     n(1),     n(2),      n(3),      n(4),      n(5),      small(6), small(7),
          small(8), small(9), small(10), small(11), small(12), small(13), nhwc};
}

// How a separable forward would be served, for rk.explain: 0 step by step, since the fused kernel does not serve it; 1
// step by step, since that is cheaper by the counts; 2 fused.
int64_t separable_choice(std::vector<int64_t> geometry, int64_t c_out, int64_t dtype) {
  const Conv2d g = conv2d_of(geometry, true);
  if (!cuda::fused_separable_serves(g, c_out, Dtype(dtype))) return 0;
  return cuda::fused_separable_pays(g, c_out) ? 2 : 1;
}

// Which kernel makes a depthwise convolution's result, for rk.explain: 0 its output, 1 the image's gradient, 2 the
// filter's. The number is DepthwiseKernel's.
int64_t depthwise_choice(std::vector<int64_t> geometry, bool nhwc, int64_t dtype, int64_t result) {
  const cuda::DepthwiseKernels kernels = cuda::depthwise_kernels(conv2d_of(geometry, nhwc), Dtype(dtype));
  return int64_t(result == 0 ? kernels.forward : result == 1 ? kernels.input_grad : kernels.weight_grad);
}

}  // namespace
}  // namespace rkl

STABLE_TORCH_LIBRARY_FRAGMENT(rkl, m) {
  m.def("cuda_separable_choice(int[] geometry, int c_out, int dtype) -> int");
  m.def("cuda_depthwise_choice(int[] geometry, bool nhwc, int dtype, int result) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rkl, CompositeExplicitAutograd, m) {
  m.impl("cuda_separable_choice", TORCH_BOX(&rkl::separable_choice));
  m.impl("cuda_depthwise_choice", TORCH_BOX(&rkl::depthwise_choice));
}

STABLE_TORCH_LIBRARY_IMPL(rkl, CUDA, m) {
  using Cuda = rkl::TReluOps<rkl::CudaTRelu>;
  m.impl("trelu", TORCH_BOX(&Cuda::forward));
  m.impl("trelu_", TORCH_BOX(&Cuda::forward_));
  m.impl("trelu_backward", TORCH_BOX(&Cuda::backward));
  using Depthwise = rkl::DepthwiseOps<rkl::CudaConv>;
  m.impl("depthwise_conv2d", TORCH_BOX(&Depthwise::forward));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&Depthwise::backward));
  using Separable = rkl::SeparableOps<rkl::CudaSeparable>;
  m.impl("separable_conv2d", TORCH_BOX(&Separable::forward));
  m.impl("separable_conv2d_backward", TORCH_BOX(&Separable::backward));
}

RKL_PYTHON_MODULE(_C_cuda)
