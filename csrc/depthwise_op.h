// The depthwise operators over a device's kernels: guards, outputs, layouts and early returns, shared by the CPU and
// CUDA modules.
#pragma once
#include <tuple>

#include "activation.h"
#include "tensor_args.h"

namespace rkl {

inline Activation activation_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= int64_t(Activation::gelu), "activation must be a number from 0 to ",
                  int64_t(Activation::gelu), ", got ", number);
  return Activation(number);
}

// act(x * weight + bias), of an image that is dense in g's format, in that format: by PyTorch's own convolution where
// that is faster. Kernels: as DepthwiseOps takes them.
template <class Kernels>
Tensor depthwise_output(const Conv2d& g, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        Activation act, Dtype dtype) {
  if (Kernels::left_to_pytorch(g, dtype, bias || act != Activation::none)) {
    const std::vector<int64_t> stride{g.stride_h, g.stride_w}, padding{g.padding_h, g.padding_w},
        dilation{g.dilation_h, g.dilation_w}, none{0, 0};
    const Tensor y = Kernels::in_format(
        aten("aten::convolution", "", x, weight, bias, stride, padding, dilation, false, none, g.channels), g.nhwc);
    if (act != Activation::none && y.numel())
      Kernels::epilogue(y.const_data_ptr(), nullptr, act, y.mutable_data_ptr(), g.batch * g.out_h * g.out_w, g.channels,
                        dtype, x);
    return y;
  }
  Tensor y = empty_image(x, g.batch, g.channels, g.out_h, g.out_w, g.nhwc);
  if (y.numel())
    Kernels::forward(g, x.const_data_ptr(), weight.const_data_ptr(), data_or_null(bias), act, y.mutable_data_ptr(),
                     dtype, x);
  return y;
}

// Kernels: struct with
//   static forward(Conv2d, x, weight, bias or null, activation, y, dtype, like) and
//   static backward(Conv2d, grad, x, weight, dx or null, dweight or null, dbias or null, dtype, like)
// over dense memory; `like` is a tensor on the device; and
//   static epilogue(z, bias or null, activation, out, rows, channels, dtype, like), over dense rows
//   static left_to_pytorch(Conv2d, dtype, finished) -> bool: whether PyTorch's own convolution makes the output faster;
//     finished: with a bias or an activation
//   static transposes(Conv2d, dtype, of_filter) -> bool: whether NCHW images are computed as NHWC ones; of_filter: for
//     the filter's gradient too
//   static dense(x, nhwc), in_format(x, nhwc), as tensor_args.h has them.
template <class Kernels>
struct DepthwiseOps {
  using Ints = std::vector<int64_t>;
  using Bools = std::vector<bool>;

  static Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
                        const Ints& padding, const Ints& dilation) {
    return activated(x, weight, bias, stride, padding, dilation, 0);
  }

  // With an activation behind it, for inference: it has no gradient.
  static Tensor activated(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
                          const Ints& padding, const Ints& dilation, int64_t activation) {
    const Activation act = activation_of(activation);
    const Dtype dtype = dtype_of(x, "x");
    Conv2d g = conv2d(x, weight, stride, padding, dilation);
    const bool nhwc = g.nhwc;
    check_bias(bias, x, g.channels);
    g.nhwc = nhwc || Kernels::transposes(g, dtype, false);
    const Tensor y =
        depthwise_output<Kernels>(g, Kernels::dense(x, g.nhwc), as_contiguous(weight), contiguous(bias), act, dtype);
    return Kernels::in_format(y, nhwc);
  }

  // mask: which of the gradients of x, weight and bias are wanted; the others come back empty.
  static std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                     const Ints& stride, const Ints& padding, const Ints& dilation,
                                                     const Bools& mask) {
    const Dtype dtype = dtype_of(x, "x");
    Conv2d g = conv2d(x, weight, stride, padding, dilation);
    const bool nhwc = suggests_nhwc(x);  // the image's gradient has the image's layout
    g.nhwc = nhwc;
    check_grad(grad, x, g, g.channels);
    STD_TORCH_CHECK(mask.size() == 3, "mask must have 3 values");
    g.nhwc = nhwc || ((mask[0] || mask[1]) && Kernels::transposes(g, dtype, mask[1]));
    Tensor dx = mask[0] ? empty_image(x, g.batch, g.channels, g.in_h, g.in_w, g.nhwc) : empty_vector(x, 0);
    Tensor dweight = mask[1] ? empty_filter(weight) : empty_vector(x, 0);
    Tensor dbias = empty_vector(x, mask[2] ? g.channels : 0);
    if (!grad.numel()) {
      for (Tensor* t : {&dx, &dweight, &dbias}) torch::stable::zero_(*t);
      return {mask[0] ? Kernels::in_format(dx, nhwc) : dx, dweight, dbias};
    }
    // The image is not read for its own gradient.
    const Tensor grad_in = Kernels::dense(grad, g.nhwc), x_in = mask[1] || mask[2] ? Kernels::dense(x, g.nhwc) : x,
                 weight_in = as_contiguous(weight);
    Kernels::backward(g, grad_in.const_data_ptr(), x_in.const_data_ptr(), weight_in.const_data_ptr(),
                      mask[0] ? dx.mutable_data_ptr() : nullptr, mask[1] ? dweight.mutable_data_ptr() : nullptr,
                      mask[2] ? dbias.mutable_data_ptr() : nullptr, dtype, x);
    return {mask[0] ? Kernels::in_format(dx, nhwc) : dx, dweight, dbias};
  }

  // Forward and backward as PyTorch's extension point for a device's own convolutions (aten::convolution_overrideable
  // and its backward). That has a gradient in C++, which the Stable ABI cannot give to an operator of ours. A gradient
  // in Python costs a call 30 us in a loop and 100 to 200 us in a network, where it finds no cache warm
  // (benchmarks/NOTES.md).
  static Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                            const Ints& stride, const Ints& padding, const Ints& dilation, bool transposed,
                            const Ints& /*output_padding*/, int64_t groups) {
    check_depthwise(x, transposed, groups);
    return forward(x, weight, bias, stride, padding, dilation);
  }
  static std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x,
                                                                 const Tensor& weight, const Ints& stride,
                                                                 const Ints& padding, const Ints& dilation,
                                                                 bool transposed, const Ints& /*output_padding*/,
                                                                 int64_t groups, const Bools& mask) {
    check_depthwise(x, transposed, groups);
    return backward(grad, x, weight, stride, padding, dilation, mask);
  }

 private:
  static void check_depthwise(const Tensor& x, bool transposed, int64_t groups) {
    STD_TORCH_CHECK(!transposed && x.dim() == 4 && groups == x.size(1),
                    "convolution_overrideable must be a depthwise convolution here, with as many groups as channels");
  }
};

}  // namespace rkl
