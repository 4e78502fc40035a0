// The operators on the CPU: guards, outputs and layouts here, arithmetic in cpu/. Schemas: rkl_kernels/ops.py.
#include "conv2d_op.h"
#include "cpu/kernels.h"
#include "cpu/separable/pointwise.h"
#include "cpu/separable/separable.h"
#include "depthwise_op.h"
#include "module.h"
#include "separable_op.h"
#include "trelu_op.h"

namespace rkl {
namespace {

struct CpuTRelu {
  static void forward(const void* x, void* y, int64_t n, Dtype dtype, const Tensor&) {
    cpu::kernels(dtype).trelu(x, y, n);
  }
  static void backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype, const Tensor&) {
    cpu::kernels(dtype).trelu_backward(grad, y, dx, n);
  }
};

struct CpuConv : TransposedFormats<CpuConv> {
  static bool left_to_pytorch(const Conv2d& g, Dtype dtype, bool) { return cpu::left_to_pytorch(g, dtype); }
  static constexpr bool transposes(const Conv2d&, Dtype, bool) { return false; }
  static Tensor transposed_image(const Tensor& x, bool nhwc) {
    const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
    Tensor out = empty_image(x, n, c, h, w, nhwc);
    cpu::transpose_images(x.const_data_ptr(), out.mutable_data_ptr(), nhwc, n, c, h * w, dtype_of(x, "x"));
    return out;
  }
  static void forward(const Conv2d& g, const void* x, const void* weight, const void* bias, Activation act, void* y,
                      Dtype dtype, const Tensor&) {
    const cpu::Kernels& k = cpu::kernels(dtype);
    k.depthwise_packed(g, x, k.pack_filter(g, weight, bias), act, 0, y);
  }
  static void backward(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx, void* dweight,
                       void* dbias, Dtype dtype, const Tensor&) {
    cpu::kernels(dtype).depthwise_backward(g, grad, x, weight, dx, dweight, dbias);
  }
  static void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels,
                       Dtype dtype, const Tensor&) {
    cpu::kernels(dtype).epilogue(z, bias, act, out, rows, channels);
  }
  static void activation_backward(const void* grad, const void* values, Activation act, bool from_output, void* out,
                                  int64_t rows, int64_t channels, Dtype dtype, const Tensor&) {
    cpu::kernels(dtype).activation_backward(grad, values, act, from_output, out, rows * channels);
  }
  static bool takes_planes(const Conv2d& g, int64_t c_out, Dtype dtype, bool backward) {
    const cpu::SeparablePlan plan = cpu::plan_separable(g, c_out, dtype);
    return backward ? plan.backward : plan.forward;
  }
  static Tensor pointwise(const SeparableCall& call, const Tensor& image, const Tensor& filter,
                          const std::optional<Tensor>& bias, Activation act) {
    return cpu::makes_pointwise(image.size(1), call.dtype)
               ? cpu::pointwise(image, filter, bias, act)
               : pointwise_by_matrix<CpuConv>(call, image, filter, bias, act);
  }
  static void filter_gradient(const SeparableCall& call, const Tensor& dz, const Tensor& hidden, const Tensor& out) {
    const cpu::FilterGradient how = plan(call).filter_gradient;
    const bool here = how == cpu::FilterGradient::tasks || cpu::convolves_images(call.g.channels);
    here ? cpu::filter_gradient(dz, hidden, how, out.mutable_data_ptr()) : filter_gradient_by_matrix(dz, hidden, out);
  }
  static void channel_sums(const SeparableCall& call, const Tensor& image, const Tensor& out) {
    cpu::channel_sums(image.const_data_ptr(), out.mutable_data_ptr(), call.rows, call.c_out, call.dtype);
  }

  static std::optional<Tensor> fused_forward(const SeparableCall& call, const std::optional<Tensor>& pointwise_bias) {
    if (!plan(call).forward) return std::nullopt;
    Tensor y = empty_image(call.x, call.g.batch, call.c_out, call.g.out_h, call.g.out_w, call.g.nhwc);
    cpu::separable_bands(raw(call, data_or_null(pointwise_bias)), y.mutable_data_ptr());
    return y;
  }
  static bool fused_backward(const SeparableCall& call, const Tensor& grad, const std::optional<Tensor>& y,
                             const PointwiseGradients& wanted) {
    if (!plan(call).backward) return false;
    const Conv2d& g = call.g;
    if (wanted.depthwise_out)
      *wanted.depthwise_out = empty_image(call.x, g.batch, g.channels, g.out_h, g.out_w, g.nhwc);
    const auto pointer = [](Tensor* t) { return t ? t->mutable_data_ptr() : nullptr; };
    cpu::pointwise_backward_bands(raw(call, nullptr), grad.const_data_ptr(), data_or_null(y),
                                  {pointer(wanted.depthwise_out), pointer(wanted.pointwise), pointer(wanted.bias)});
    return true;
  }

 private:
  static cpu::SeparablePlan plan(const SeparableCall& call) {
    return cpu::plan_separable(call.g, call.c_out, call.dtype);
  }
  static cpu::Separable raw(const SeparableCall& call, const void* pointwise_bias) {
    return {call.g,
            call.c_out,
            call.inner_act,
            call.act,
            call.dtype,
            call.x.const_data_ptr(),
            call.depthwise.const_data_ptr(),
            data_or_null(call.depthwise_bias),
            call.pointwise.const_data_ptr(),
            pointwise_bias};
  }
};

struct CpuConv2d {
  static constexpr bool kBiasIsFree = true;
  static std::optional<Tensor> pointwise_in_one(const Tensor& image, const Tensor& filter,
                                                const std::optional<Tensor>& bias, Activation act, Dtype dtype) {
    if (!cpu::makes_pointwise(image.size(1), dtype)) return std::nullopt;
    return cpu::pointwise(image, filter, bias, act);
  }
  static void bias_and_activation(const Tensor& x, const std::optional<Tensor>&, Activation act, Dtype dtype) {
    void* const memory = x.mutable_data_ptr();
    cpu::kernels(dtype).epilogue(memory, nullptr, act, memory, x.numel(), 1);
  }
};

// The plan of a separable call, for rk.explain: whether images are NHWC; for forward, then for backward, whether it is
// computed in NHWC and whether in bands; SeparablePlan's filter_gradient.
std::vector<int64_t> separable_plan(const Tensor& x, const Tensor& depthwise, int64_t outputs,
                                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                    const std::vector<int64_t>& dilation) {
  const Dtype dtype = dtype_of(x, "x");
  const Conv2d given = conv2d(x, depthwise, stride, padding, dilation);
  const auto plan = [&](bool backward) {
    Conv2d g = given;
    g.nhwc = SeparableOps<CpuConv>::computes_in_nhwc(given, x, outputs, dtype, backward);
    return std::make_pair(g.nhwc, cpu::plan_separable(g, outputs, dtype));
  };
  const auto [nhwc, forward] = plan(false);
  const auto [nhwc_backward, backward] = plan(true);
  return {given.nhwc || suggests_nhwc(x),   nhwc, forward.forward, nhwc_backward, backward.backward,
          int64_t(backward.filter_gradient)};
}

// Whether PyTorch's own convolution makes a depthwise output, for rk.explain.
bool depthwise_by_pytorch(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  return cpu::left_to_pytorch(conv2d(x, weight, stride, padding, dilation), dtype_of(x, "x"));
}

}  // namespace
}  // namespace rkl

STABLE_TORCH_LIBRARY_FRAGMENT(rkl, m) {
  m.def("cpu_depthwise_by_pytorch(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation) -> bool");
  m.def(
      "cpu_separable_plan(Tensor x, Tensor depthwise_weight, int outputs, int[2] stride, int[2] padding, "
      "int[2] dilation) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(rkl, CPU, m) {
  m.impl("cpu_depthwise_by_pytorch", RKL_BOX(rkl::depthwise_by_pytorch));
  m.impl("cpu_separable_plan", RKL_BOX(rkl::separable_plan));
  using TRelu = rkl::TReluOps<rkl::CpuTRelu>;
  m.impl("trelu", RKL_BOX(TRelu::forward));
  m.impl("trelu_", RKL_BOX(TRelu::forward_));
  m.impl("trelu_backward", RKL_BOX(TRelu::backward));
  using Depthwise = rkl::DepthwiseOps<rkl::CpuConv>;
  m.impl("depthwise_conv2d", RKL_BOX(Depthwise::forward));
  m.impl("depthwise_conv2d_backward", RKL_BOX(Depthwise::backward));
  m.impl("depthwise_conv2d_activated", RKL_BOX(Depthwise::activated));
  m.impl("conv2d_activated", RKL_BOX(rkl::Conv2dOps<rkl::CpuConv2d>::activated));
  using Separable = rkl::SeparableOps<rkl::CpuConv>;
  m.impl("separable_conv2d", RKL_BOX(Separable::forward));
  m.impl("separable_conv2d_backward", RKL_BOX(Separable::backward));
}

STABLE_TORCH_LIBRARY_IMPL(aten, CPU, m) {
  using Depthwise = rkl::DepthwiseOps<rkl::CpuConv>;
  m.impl("convolution_overrideable", RKL_BOX(Depthwise::convolution));
  m.impl("convolution_backward_overrideable", RKL_BOX(Depthwise::convolution_backward));
}

RKL_PYTHON_MODULE(_C)
