// From tensors to what kernels take: the one guard in C++ (a direct torch.ops.rkl call must not read out of bounds; the
// friendly messages are in rkl_kernels/_checks.py), the layout rule and the allocation of outputs.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "aten.h"
#include "geometry.h"

namespace rkl {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntList = torch::headeronly::IntHeaderOnlyArrayRef;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 for this kernel; use the reference backend");
  }
}

// Whether a 4-dimensional tensor's strides say NHWC: PyTorch's own rule (suggest_memory_format), which looks at the
// order of the strides, not at density, and takes the NCHW side where sizes of 1 leave both readings open.
inline bool suggests_nhwc(const Tensor& x) {
  int64_t least = 0;
  for (int dim : {1, 3, 2, 0}) {
    const int64_t size = x.size(dim), stride = x.stride(dim);
    if (size == 0 || stride < least || (dim == 1 && stride == 0)) return false;
    if (dim == 0 && least == x.stride(1)) return false;
    least = size > 1 ? stride * size : stride;
  }
  return true;
}

inline MemoryFormat format_of(bool nhwc) { return nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }

// The tensor dense in the given layout: itself where it is so already (sizes of 1 do not count).
inline Tensor dense(const Tensor& x, bool nhwc) { return torch::stable::contiguous(x, format_of(nhwc)); }

inline Tensor empty_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool nhwc) {
  const std::array<int64_t, 4> size{n, c, h, w};
  return torch::stable::empty(IntList(size.data(), 4), like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              format_of(nhwc));
}

// A dense NHWC image as a matrix of pixels by channels: a view.
inline Tensor pixel_rows(const Tensor& x) {
  const std::vector<int64_t> nhwc{0, 2, 3, 1}, rows{x.size(0) * x.size(2) * x.size(3), x.size(1)};
  return torch::stable::view(aten("aten::permute", "", x, nhwc), rows);
}

// x with the strides of the given format, whatever its sizes of 1; x itself where it has them.
inline Tensor in_format(const Tensor& x, bool nhwc) {
  Tensor out = empty_image(x, 0, x.size(1), x.size(2), x.size(3), nhwc);
  bool same = true;
  for (int64_t d = 0; d < 4; ++d) same = same && out.stride(d) == x.stride(d);
  if (same) return x;
  out = empty_image(x, x.size(0), x.size(1), x.size(2), x.size(3), nhwc);
  return torch::stable::copy_(out, x);
}

// For a filter's gradient. (C, 1, kh, kw) has its elements in the same order in either format; the strides differ.
inline Tensor empty_filter(const Tensor& weight) {
  return empty_image(weight, weight.size(0), weight.size(1), weight.size(2), weight.size(3), suggests_nhwc(weight));
}

inline Tensor empty_vector(const Tensor& like, int64_t n) { return torch::stable::new_empty(like, {n}); }

// Whether two tensors of one shape have their elements in the same places (strides of sizes of 1 do not count).
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// x laid out like the dense tensor `layout` of the same shape; x itself where it is so already.
inline Tensor laid_out_like(const Tensor& x, const Tensor& layout) {
  if (same_strides(x, layout)) return x;
  Tensor out = torch::stable::empty_like(layout);
  return torch::stable::copy_(out, x);
}

inline void check_same(const Tensor& a, const Tensor& b, const char* names) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.device() == b.device(), names,
                  " must have one type and one device");
}

// The geometry of a depthwise convolution, or an error where the arguments do not fit together.
inline Conv2d conv2d(const Tensor& x, const Tensor& weight, IntList stride, IntList padding, IntList dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "x and weight must have 4 dimensions, got ", x.dim(), " and ",
                  weight.dim());
  STD_TORCH_CHECK(weight.size(0) == x.size(1) && weight.size(1) == 1,
                  "weight must have shape (C, 1, kh, kw) with C = ", x.size(1), ", got C = ", weight.size(0), " and ",
                  weight.size(1));
  check_same(x, weight, "x and weight");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation must be pairs");
  Conv2d g{x.size(0),
           x.size(1),
           x.size(2),
           x.size(3),
           0,
           0,
           int(weight.size(2)),
           int(weight.size(3)),
           int(stride[0]),
           int(stride[1]),
           int(padding[0]),
           int(padding[1]),
           int(dilation[0]),
           int(dilation[1]),
           suggests_nhwc(x) || suggests_nhwc(weight)};
  STD_TORCH_CHECK(g.kernel_h > 0 && g.kernel_w > 0 && g.stride_h > 0 && g.stride_w > 0 && g.dilation_h > 0 &&
                      g.dilation_w > 0 && g.padding_h >= 0 && g.padding_w >= 0,
                  "kernel, stride and dilation must be positive and padding not negative");
  const int64_t free_h = g.in_h + 2 * g.padding_h - g.dilation_h * (g.kernel_h - 1) - 1;
  const int64_t free_w = g.in_w + 2 * g.padding_w - g.dilation_w * (g.kernel_w - 1) - 1;
  STD_TORCH_CHECK(free_h >= 0 && free_w >= 0, "the dilated filter must fit into the padded image");
  g.out_h = free_h / g.stride_h + 1;
  g.out_w = free_w / g.stride_w + 1;
  return g;
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t channels) {
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, "bias must have shape (", channels, ",)");
  check_same(x, *bias, "x and bias");
}

inline void check_grad(const Tensor& grad, const Tensor& x, const Conv2d& g, int64_t channels) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == g.batch && grad.size(1) == channels && grad.size(2) == g.out_h &&
                      grad.size(3) == g.out_w,
                  "grad must have the shape of the output, (", g.batch, ", ", channels, ", ", g.out_h, ", ", g.out_w,
                  ")");
  check_same(x, grad, "x and grad");
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
}

inline const void* data_or_null(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

}  // namespace rkl
