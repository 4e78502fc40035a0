// The separable operators as a depthwise step, a library's matrix product and an epilogue: what serves every shape on
// every device. Images are taken as NHWC, where the pointwise step is one matrix product over all pixels.
#pragma once
#include "depthwise_op.h"

namespace rkl {

// The tensor that an ATen operator returns.
template <class... Args>
Tensor aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A dense NHWC image as a matrix of pixels by channels: a view.
inline Tensor pixel_rows(const Tensor& x) {
  const std::vector<int64_t> nhwc{0, 2, 3, 1}, rows{x.size(0) * x.size(2) * x.size(3), x.size(1)};
  return torch::stable::view(aten("aten::permute", "", x, nhwc), rows);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

inline void matrix_product(const Tensor& a, const Tensor& b, const Tensor& out) { aten("aten::mm", "out", a, b, out); }

// Kernels: as DepthwiseOps takes them, and over a dense matrix of pixels by channels
//   static epilogue(z, bias or null, activation, out, rows, channels, dtype, like): out = act(z + bias)
//   static slope(grad, values, activation, from_output, out, rows, channels, dtype, like): out = grad * act'(...)
//   static column_sums(matrix, out, rows, channels, dtype, like)
// where out may be the first argument.
template <class Kernels>
struct SeparableOps {
  using Ints = std::vector<int64_t>;
  using Bools = std::vector<bool>;
  using Maybe = std::optional<Tensor>;

  static Activation activation_of(int64_t number) {
    STD_TORCH_CHECK(number >= 0 && number <= int64_t(Activation::gelu), "activation must be a number from 0 to ",
                    int64_t(Activation::gelu), ", got ", number);
    return Activation(number);
  }

  static void check_pointwise(const Tensor& pointwise, const Tensor& x) {
    STD_TORCH_CHECK(
        pointwise.dim() == 4 && pointwise.size(1) == x.size(1) && pointwise.size(2) == 1 && pointwise.size(3) == 1,
        "pointwise_weight must have shape (C_out, C, 1, 1) with C = ", x.size(1));
    check_same(x, pointwise, "x and pointwise_weight");
  }

  static Tensor as_matrix(const Tensor& pointwise) {
    const std::vector<int64_t> size{pointwise.size(0), pointwise.size(1)};
    return torch::stable::reshape(pointwise, size);
  }

  static Tensor depthwise(const Conv2d& g, const Tensor& x, const Tensor& weight, const Maybe& bias, Activation act,
                          Dtype dtype) {
    Tensor out = empty_image(x, g.batch, g.channels, g.out_h, g.out_w, true);
    const Tensor weight_in = torch::stable::contiguous(weight);
    const Maybe bias_in = contiguous(bias);
    Kernels::forward(g, x.const_data_ptr(), weight_in.const_data_ptr(), data_or_null(bias_in), act,
                     out.mutable_data_ptr(), dtype, x);
    return out;
  }

  static Tensor forward(const Tensor& x, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                        const Maybe& depthwise_bias, const Maybe& pointwise_bias, const Ints& stride,
                        const Ints& padding, const Ints& dilation, int64_t inner_activation, int64_t activation) {
    const Dtype dtype = dtype_of(x, "x");
    Conv2d g = conv2d(x, depthwise_weight, stride, padding, dilation);
    const bool nhwc = g.nhwc;
    const int64_t c_out = pointwise_weight.size(0);
    check_pointwise(pointwise_weight, x);
    check_bias(depthwise_bias, x, g.channels);
    check_bias(pointwise_bias, x, c_out);
    const Activation inner_act = activation_of(inner_activation), act = activation_of(activation);
    Tensor y = empty_image(x, g.batch, c_out, g.out_h, g.out_w, true);
    if (y.numel()) {
      g.nhwc = true;
      const Tensor inner = depthwise(g, dense(x, true), depthwise_weight, depthwise_bias, inner_act, dtype);
      matrix_product(pixel_rows(inner), transposed(as_matrix(pointwise_weight)), pixel_rows(y));
      const Maybe bias_in = contiguous(pointwise_bias);
      if (bias_in || act != Activation::none)
        Kernels::epilogue(y.const_data_ptr(), data_or_null(bias_in), act, y.mutable_data_ptr(), y.numel() / c_out,
                          c_out, dtype, x);
    }
    return in_format(y, nhwc);
  }

  // mask: which of the gradients of (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias).
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad, const Maybe& y, const Tensor& x, const Tensor& depthwise_weight,
      const Tensor& pointwise_weight, const Maybe& depthwise_bias, const Ints& stride, const Ints& padding,
      const Ints& dilation, int64_t inner_activation, int64_t activation, const Bools& mask) {
    const Dtype dtype = dtype_of(x, "x");
    Conv2d g = conv2d(x, depthwise_weight, stride, padding, dilation);
    g.nhwc = true;
    const int64_t c = g.channels, c_out = pointwise_weight.size(0), rows = g.batch * g.out_h * g.out_w;
    check_pointwise(pointwise_weight, x);
    check_bias(depthwise_bias, x, c);
    check_grad(grad, x, g, c_out);
    STD_TORCH_CHECK(mask.size() == 5, "mask must have 5 values");
    const Activation inner_act = activation_of(inner_activation), act = activation_of(activation);
    STD_TORCH_CHECK(act != Activation::silu && act != Activation::gelu,
                    "activation must be one whose gradient can be told from its output; apply silu or gelu outside");
    STD_TORCH_CHECK(act == Activation::none || y, "y must be given where there is an activation");
    const bool nhwc = suggests_nhwc(x);
    Tensor dx = mask[0] ? empty_image(x, g.batch, c, g.in_h, g.in_w, true) : empty_vector(x, 0);
    Tensor d_depthwise = mask[1] ? empty_filter(depthwise_weight) : empty_vector(x, 0);
    Tensor d_pointwise = mask[2] ? empty_filter(pointwise_weight) : empty_vector(x, 0);
    Tensor d_depthwise_bias = empty_vector(x, mask[3] ? c : 0), d_pointwise_bias = empty_vector(x, mask[4] ? c_out : 0);
    if (!rows || !c || !c_out) {
      for (Tensor* t : {&dx, &d_depthwise, &d_pointwise, &d_depthwise_bias, &d_pointwise_bias})
        torch::stable::zero_(*t);
      return {mask[0] ? in_format(dx, nhwc) : dx, d_depthwise, d_pointwise, d_depthwise_bias, d_pointwise_bias};
    }

    Tensor dz = dense(grad, true);
    if (act != Activation::none) {
      check_grad(*y, x, g, c_out);
      const Tensor grad_in = dz, y_in = dense(*y, true);
      dz = torch::stable::empty_like(grad_in);
      Kernels::slope(grad_in.const_data_ptr(), y_in.const_data_ptr(), act, true, dz.mutable_data_ptr(), rows, c_out,
                     dtype, x);
    }
    if (mask[4]) Kernels::column_sums(dz.const_data_ptr(), d_pointwise_bias.mutable_data_ptr(), rows, c_out, dtype, x);

    const Tensor x_in = dense(x, true);
    Tensor inner;  // the depthwise output before its activation, made again
    if (mask[2] || inner_act != Activation::none)
      inner = depthwise(g, x_in, depthwise_weight, depthwise_bias, Activation::none, dtype);
    if (mask[2]) {
      Tensor activated = inner;
      if (inner_act != Activation::none) {
        activated = torch::stable::empty_like(inner);
        Kernels::epilogue(inner.const_data_ptr(), nullptr, inner_act, activated.mutable_data_ptr(), rows, c, dtype, x);
      }
      matrix_product(transposed(pixel_rows(dz)), pixel_rows(activated), as_matrix(d_pointwise));
    }
    if (mask[0] || mask[1] || mask[3]) {
      Tensor d_inner = empty_image(x, g.batch, c, g.out_h, g.out_w, true);
      matrix_product(pixel_rows(dz), as_matrix(pointwise_weight), pixel_rows(d_inner));
      if (inner_act != Activation::none)
        Kernels::slope(d_inner.const_data_ptr(), inner.const_data_ptr(), inner_act, false, d_inner.mutable_data_ptr(),
                       rows, c, dtype, x);
      const Tensor weight_in = torch::stable::contiguous(depthwise_weight);
      Kernels::backward(g, d_inner.const_data_ptr(), x_in.const_data_ptr(), weight_in.const_data_ptr(),
                        mask[0] ? dx.mutable_data_ptr() : nullptr, mask[1] ? d_depthwise.mutable_data_ptr() : nullptr,
                        mask[3] ? d_depthwise_bias.mutable_data_ptr() : nullptr, dtype, x);
    }
    return {mask[0] ? in_format(dx, nhwc) : dx, d_depthwise, d_pointwise, d_depthwise_bias, d_pointwise_bias};
  }
};

}  // namespace rkl
