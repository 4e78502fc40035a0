// Any convolution of PyTorch's with an activation behind it, for inference: it has no gradient. Shared by the CPU and
// CUDA modules.
#pragma once
#include <algorithm>

#include "depthwise_op.h"

namespace rkl {

// Kernels: struct with
//   static kBiasIsFree: whether PyTorch's convolution adds the bias without an extra pass; if so it adds it
//   static pointwise_in_one(image, filter (C', C), bias or none, activation, dtype) -> image or none: over dense NHWC
//   images; returns none, with nothing done, where it does not serve
//   static bias_and_activation(image, bias or none, activation, dtype), in place, over a dense image of either format.
template <class Kernels>
struct Conv2dOps {
  using Ints = std::vector<int64_t>;
  using Maybe = std::optional<Tensor>;

  static bool is_pointwise(const Tensor& weight, const Ints& stride, const Ints& padding, int64_t groups) {
    const auto all = [](const Ints& numbers, int64_t value) {
      return std::all_of(numbers.begin(), numbers.end(), [=](int64_t n) { return n == value; });
    };
    return weight.size(2) == 1 && weight.size(3) == 1 && groups == 1 && all(stride, 1) && all(padding, 0);
  }

  static Tensor activated(const Tensor& x, const Tensor& weight, const Maybe& bias, const Ints& stride,
                          const Ints& padding, const Ints& dilation, int64_t groups, int64_t activation) {
    const Dtype dtype = dtype_of(x, "x");
    const Activation act = activation_of(activation);
    STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "x and weight must have 4 dimensions");
    check_same(x, weight, "x and weight");
    check_bias(bias, x, weight.size(0));
    const Maybe bias_in = contiguous(bias), none;
    // A single pixel is dense in either format, and its output has PyTorch's strides.
    const bool nhwc = suggests_nhwc(x), one = x.size(2) == 1 && x.size(3) == 1;
    const bool fits = weight.size(1) == x.size(1) && weight.numel() && (nhwc || one) && is_dense(x, true);
    if (fits && is_pointwise(weight, stride, padding, groups))
      if (Maybe y = Kernels::pointwise_in_one(x, as_matrix(weight), bias_in, act, dtype))
        return nhwc ? *y : in_strides(*y, suggests_nhwc(weight));
    const Maybe &added_there = Kernels::kBiasIsFree ? bias_in : none,
                &added_here = Kernels::kBiasIsFree ? none : bias_in;
    Tensor y =
        aten("aten::convolution", "", x, weight, added_there, stride, padding, dilation, false, Ints{0, 0}, groups);
    if (!y.numel() || (!added_here && act == Activation::none)) return y;
    if (!is_dense(y, true)) y = dense(y, false);
    Kernels::bias_and_activation(y, added_here, act, dtype);
    return y;
  }
};

}  // namespace rkl
