// The separable operators as a depthwise step, a library's matrix product and an epilogue: what serves every shape on
// every device. Images are taken as NHWC, where the pointwise step is one matrix product over all pixels, unless the
// device's kernels compute in NCHW.
#pragma once
#include "depthwise_op.h"

namespace rkl {

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

inline void matrix_product(const Tensor& a, const Tensor& b, const Tensor& out) { aten("aten::mm", "out", a, b, out); }

// One call's arguments, checked against each other, and dense in the format that is computed in.
struct SeparableCall {
  Dtype dtype;
  Conv2d g;   // g.nhwc: the format that is computed in
  bool nhwc;  // the output's format: what F.conv2d would give
  int64_t c_out, rows;
  Activation inner_act, act;
  Tensor x, depthwise, pointwise;
  std::optional<Tensor> depthwise_bias;
};

// The gradients that a pointwise step makes, null where they are not wanted: of its filter and its bias, into tensors
// that exist, and of the depthwise output before its activation, a tensor that the step allocates.
struct PointwiseGradients {
  Tensor *depthwise_out, *pointwise, *bias;
};

// act(out + bias), in place, over the pointwise step's product.
template <class Kernels>
Tensor finish_pointwise(const SeparableCall& call, const Tensor& out, const std::optional<Tensor>& bias,
                        Activation act) {
  if (bias || act != Activation::none)
    Kernels::epilogue(out.const_data_ptr(), data_or_null(bias), act, out.mutable_data_ptr(), call.rows, out.size(1),
                      call.dtype, out);
  return out;
}

// The pointwise step as one matrix product over all pixels of NHWC images, for devices without a better way:
// act(filter (C', C) times image + bias).
template <class Kernels>
Tensor pointwise_by_matrix(const SeparableCall& call, const Tensor& image, const Tensor& filter,
                           const std::optional<Tensor>& bias, Activation act) {
  const Conv2d& g = call.g;
  Tensor out = empty_image(image, g.batch, filter.size(0), g.out_h, g.out_w, true);
  matrix_product(pixel_rows(image), transposed(filter), pixel_rows(out));
  return finish_pointwise<Kernels>(call, out, bias, act);
}

// And its filter's gradient, dz times hidden summed over all pixels, into `out`, (C', C).
inline void filter_gradient_by_matrix(const Tensor& dz, const Tensor& hidden, const Tensor& out) {
  matrix_product(transposed(pixel_rows(dz)), pixel_rows(hidden), out);
}

// Kernels: as DepthwiseOps takes them, and over a dense matrix of rows by channels, or of any elements where there is
// no bias,
//   static epilogue(z, bias or null, activation, out, rows, channels, dtype, like): out = act(z + bias)
//   static activation_backward(grad, values, activation, from_output, out, rows, channels, dtype, like): out = grad *
//   act'(...)
// where out may be the first argument. Over images in the format that is computed in:
//   static pointwise(call, image, filter, bias or none, activation) -> image, as pointwise_by_matrix above
//   static filter_gradient(call, dz, hidden, out), as filter_gradient_by_matrix above
//   static channel_sums(call, image, out): each channel's sum, the pointwise bias's gradient
//   static takes_planes(Conv2d, C', dtype, backward)
// The last says whether NCHW images are computed in NCHW; else they are transposed to NHWC. For devices with kernels
// that do more at once:
//   static fused_forward(call, pointwise bias or none) -> image or none
//   static fused_backward(call, grad, y if activated, PointwiseGradients)
// These return none and false, with nothing done, where the unfused steps serve.
template <class Kernels>
struct SeparableOps {
  using Ints = std::vector<int64_t>;
  using Bools = std::vector<bool>;
  using Maybe = std::optional<Tensor>;
  using Call = SeparableCall;

  static void check_pointwise(const Tensor& pointwise, const Tensor& x) {
    STD_TORCH_CHECK(
        pointwise.dim() == 4 && pointwise.size(1) == x.size(1) && pointwise.size(2) == 1 && pointwise.size(3) == 1,
        "pointwise_weight must have shape (C_out, C, 1, 1) with C = ", x.size(1));
    check_same(x, pointwise, "x and pointwise_weight");
  }

  // The format that is computed in; g has the output's.
  static bool computes_in_nhwc(const Conv2d& g, const Tensor& x, int64_t c_out, Dtype dtype, bool backward) {
    return g.nhwc || suggests_nhwc(x) || !Kernels::takes_planes(g, c_out, dtype, backward);
  }

  static Call checked(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise, const Maybe& depthwise_bias,
                      const Ints& stride, const Ints& padding, const Ints& dilation, int64_t inner_activation,
                      int64_t activation, bool backward) {
    const Dtype dtype = dtype_of(x, "x");
    Conv2d g = conv2d(x, depthwise, stride, padding, dilation);
    const bool nhwc = g.nhwc;
    check_pointwise(pointwise, x);
    g.nhwc = computes_in_nhwc(g, x, pointwise.size(0), dtype, backward);
    check_bias(depthwise_bias, x, g.channels);
    return {dtype,
            g,
            nhwc,
            pointwise.size(0),
            g.batch * g.out_h * g.out_w,
            activation_of(inner_activation),
            activation_of(activation),
            Kernels::dense(x, g.nhwc),
            as_contiguous(depthwise),
            as_contiguous(as_matrix(pointwise)),
            contiguous(depthwise_bias)};
  }

  static Tensor depthwise(const Call& call, Activation act) {
    return depthwise_output<Kernels>(call.g, call.x, call.depthwise, call.depthwise_bias, act, call.dtype);
  }

  static Tensor forward(const Tensor& x, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                        const Maybe& depthwise_bias, const Maybe& pointwise_bias, const Ints& stride,
                        const Ints& padding, const Ints& dilation, int64_t inner_activation, int64_t activation) {
    const Call call = checked(x, depthwise_weight, pointwise_weight, depthwise_bias, stride, padding, dilation,
                              inner_activation, activation, false);
    check_bias(pointwise_bias, x, call.c_out);
    if (!call.rows || !call.c_out)
      return empty_image(x, call.g.batch, call.c_out, call.g.out_h, call.g.out_w, call.nhwc);
    const Maybe bias = contiguous(pointwise_bias);
    Maybe y = Kernels::fused_forward(call, bias);
    if (!y) y = Kernels::pointwise(call, depthwise(call, call.inner_act), call.pointwise, bias, call.act);
    return Kernels::in_format(*y, call.nhwc);
  }

  // The pointwise step's gradients, unfused.
  static void pointwise_backward(const Call& call, const Tensor& grad, const Maybe& y,
                                 const PointwiseGradients& wanted) {
    const int64_t c = call.g.channels, rows = call.rows;
    Tensor dz = grad;
    if (y) {
      dz = new_like(grad);
      Kernels::activation_backward(grad.const_data_ptr(), y->const_data_ptr(), call.act, true, dz.mutable_data_ptr(),
                                   rows, call.c_out, call.dtype, call.x);
    }
    if (wanted.bias) Kernels::channel_sums(call, dz, *wanted.bias);
    const bool activated = call.inner_act != Activation::none;
    Tensor depthwise_out;  // made again
    if (wanted.pointwise || activated) depthwise_out = depthwise(call, Activation::none);
    if (wanted.pointwise) {
      Tensor hidden = depthwise_out;
      if (activated) {
        hidden = new_like(depthwise_out);
        Kernels::epilogue(depthwise_out.const_data_ptr(), nullptr, call.inner_act, hidden.mutable_data_ptr(), rows, c,
                          call.dtype, call.x);
      }
      Kernels::filter_gradient(call, dz, hidden, as_matrix(*wanted.pointwise));
    }
    if (!wanted.depthwise_out) return;
    *wanted.depthwise_out = Kernels::pointwise(call, dz, transposed(call.pointwise), std::nullopt, Activation::none);
    if (activated)
      Kernels::activation_backward(wanted.depthwise_out->const_data_ptr(), depthwise_out.const_data_ptr(),
                                   call.inner_act, false, wanted.depthwise_out->mutable_data_ptr(), rows, c, call.dtype,
                                   call.x);
  }

  // mask: which of the gradients of (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias).
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad, const Maybe& y, const Tensor& x, const Tensor& depthwise_weight,
      const Tensor& pointwise_weight, const Maybe& depthwise_bias, const Ints& stride, const Ints& padding,
      const Ints& dilation, int64_t inner_activation, int64_t activation, const Bools& mask) {
    const Call call = checked(x, depthwise_weight, pointwise_weight, depthwise_bias, stride, padding, dilation,
                              inner_activation, activation, true);
    const Conv2d& g = call.g;
    check_grad(grad, x, g, call.c_out);
    STD_TORCH_CHECK(mask.size() == 5, "mask must have 5 values");
    STD_TORCH_CHECK(call.act != Activation::silu && call.act != Activation::gelu,
                    "activation must be one whose gradient can be told from its output; apply silu or gelu outside");
    const bool activated = call.act != Activation::none, nhwc = suggests_nhwc(x);
    STD_TORCH_CHECK(!activated || y, "y must be given where there is an activation");
    if (activated) check_grad(*y, x, g, call.c_out);
    Tensor dx = mask[0] ? empty_image(x, g.batch, g.channels, g.in_h, g.in_w, g.nhwc) : empty_vector(x, 0);
    Tensor d_depthwise = mask[1] ? empty_filter(depthwise_weight) : empty_vector(x, 0);
    Tensor d_pointwise = mask[2] ? empty_filter(pointwise_weight) : empty_vector(x, 0);
    Tensor d_depthwise_bias = empty_vector(x, mask[3] ? g.channels : 0);
    Tensor d_pointwise_bias = empty_vector(x, mask[4] ? call.c_out : 0);
    if (!call.rows || !g.channels || !call.c_out) {
      for (Tensor* t : {&dx, &d_depthwise, &d_pointwise, &d_depthwise_bias, &d_pointwise_bias})
        torch::stable::zero_(*t);
      return {mask[0] ? Kernels::in_format(dx, nhwc) : dx, d_depthwise, d_pointwise, d_depthwise_bias,
              d_pointwise_bias};
    }

    const Tensor grad_in = Kernels::dense(grad, g.nhwc);
    const Maybe y_in = activated ? Maybe(Kernels::dense(*y, g.nhwc)) : std::nullopt;
    const bool wants_inner = mask[0] || mask[1] || mask[3];
    Tensor d_inner;
    const PointwiseGradients wanted{wants_inner ? &d_inner : nullptr, mask[2] ? &d_pointwise : nullptr,
                                    mask[4] ? &d_pointwise_bias : nullptr};
    if (!Kernels::fused_backward(call, grad_in, y_in, wanted)) pointwise_backward(call, grad_in, y_in, wanted);
    const auto pointer_if = [](bool wanted, Tensor& t) { return wanted ? t.mutable_data_ptr() : nullptr; };
    if (wants_inner)
      Kernels::backward(g, d_inner.const_data_ptr(), call.x.const_data_ptr(), call.depthwise.const_data_ptr(),
                        pointer_if(mask[0], dx), pointer_if(mask[1], d_depthwise),
                        pointer_if(mask[3], d_depthwise_bias), call.dtype, x);
    return {mask[0] ? Kernels::in_format(dx, nhwc) : dx, d_depthwise, d_pointwise, d_depthwise_bias, d_pointwise_bias};
  }
};

}  // namespace rkl
