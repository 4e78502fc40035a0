// The operators on the CPU: guards, outputs and layouts here, arithmetic in cpu/. Schemas: rkl_kernels/ops.py.
#include "cpu/kernels.h"
#include "cpu/separable.h"
#include "depthwise_op.h"
#include "module.h"
#include "separable_op.h"
#include "trelu_op.h"

namespace rkl {
namespace {

struct CpuTRelu {
  static void forward(const void* x, void* y, int64_t n, Dtype dtype, const Tensor&) {
    cpu::kernels(dtype).trelu(x, y, n, dtype);
  }
  static void backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype, const Tensor&) {
    cpu::kernels(dtype).trelu_backward(grad, y, dx, n, dtype);
  }
};

struct CpuConv {
  static void forward(const Conv2d& g, const void* x, const void* weight, const void* bias, Activation act, void* y,
                      Dtype dtype, const Tensor&) {
    cpu::kernels(dtype).depthwise(g, x, weight, bias, act, y, dtype);
  }
  static void backward(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx, void* dweight,
                       void* dbias, Dtype dtype, const Tensor&) {
    cpu::kernels(dtype).depthwise_backward(g, grad, x, weight, dx, dweight, dbias, dtype);
  }
  static void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels,
                       Dtype dtype, const Tensor&) {
    cpu::kernels(dtype).epilogue(z, bias, act, out, rows, channels, dtype);
  }
  static void slope(const void* grad, const void* values, Activation act, bool from_output, void* out, int64_t rows,
                    int64_t channels, Dtype dtype, const Tensor&) {
    cpu::kernels(dtype).slope(grad, values, act, from_output, out, rows * channels, dtype);
  }
  static void column_sums(const void* matrix, void* out, int64_t rows, int64_t channels, Dtype dtype, const Tensor&) {
    cpu::column_sums(matrix, out, rows, channels, dtype);
  }

  static bool takes_planes(const Conv2d& g, Dtype dtype, bool backward) {
    return cpu::takes_planes(g, dtype, backward);
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
  static bool fused_forward(const SeparableCall& call, const void* pointwise_bias, void* y) {
    cpu::separable(raw(call, pointwise_bias), y);
    return true;
  }
  static bool fused_backward(const SeparableCall& call, const Tensor& grad, const std::optional<Tensor>& y,
                             Tensor* d_inner, Tensor* d_pointwise, Tensor* d_pointwise_bias) {
    const auto pointer = [](Tensor* t) { return t ? t->mutable_data_ptr() : nullptr; };
    cpu::pointwise_backward(raw(call, nullptr), grad.const_data_ptr(), data_or_null(y),
                            {pointer(d_inner), pointer(d_pointwise), pointer(d_pointwise_bias)});
    return true;
  }
};

}  // namespace
}  // namespace rkl

STABLE_TORCH_LIBRARY_IMPL(rkl, CPU, m) {
  using TRelu = rkl::TReluOps<rkl::CpuTRelu>;
  m.impl("trelu", TORCH_BOX(&TRelu::forward));
  m.impl("trelu_", TORCH_BOX(&TRelu::forward_));
  m.impl("trelu_backward", TORCH_BOX(&TRelu::backward));
  using Depthwise = rkl::DepthwiseOps<rkl::CpuConv>;
  m.impl("depthwise_conv2d", TORCH_BOX(&Depthwise::forward));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&Depthwise::backward));
  using Separable = rkl::SeparableOps<rkl::CpuConv>;
  m.impl("separable_conv2d", TORCH_BOX(&Separable::forward));
  m.impl("separable_conv2d_backward", TORCH_BOX(&Separable::backward));
}

RKL_PYTHON_MODULE(_C)
