// From tensors to what kernels take: the one guard in C++ (a direct torch.ops.rkl call must not read out of bounds; the
// friendly messages are in rkl_kernels/_checks.py), the rule for layouts, and the allocation of outputs.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <limits>
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

// Strides of a dense image.
inline std::array<int64_t, 4> image_strides(int64_t c, int64_t h, int64_t w, bool nhwc) {
  if (nhwc) return {h * w * c, 1, w * c, c};
  const auto some = [](int64_t n) { return n > 0 ? n : 1; };  // PyTorch's rule, for NCHW only
  return {some(c) * some(h) * some(w), some(h) * some(w), some(w), 1};
}

// Whether the tensor is dense in the given layout (sizes of 1 do not count).
inline bool is_dense(const Tensor& x, bool nhwc) {
  const std::array<int64_t, 4> strides = image_strides(x.size(1), x.size(2), x.size(3), nhwc);
  bool same = x.numel() > 0;
  for (int64_t d = 0; d < 4; ++d) same = same && (x.size(d) == 1 || x.stride(d) == strides[d]);
  return same;
}

// x dense in the given layout; x itself where it is so already. That is checked here first, since each call of
// PyTorch's own looks up the operator by its name.
inline Tensor dense(const Tensor& x, bool nhwc) {
  return is_dense(x, nhwc) ? x : torch::stable::contiguous(x, format_of(nhwc));
}

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// A new tensor of the type and device of `like`. The dispatcher is not used: it would look up an operator by its name.
inline Tensor empty_strided(const Tensor& like, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int32_t dtype, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &out));
  return Tensor(out);
}

inline Tensor empty_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool nhwc) {
  const std::array<int64_t, 4> sizes{n, c, h, w}, strides = image_strides(c, h, w, nhwc);
  return empty_strided(like, 4, sizes.data(), strides.data());
}

// A new dense tensor like x: dimensions in x's order in memory, without x's gaps.
inline Tensor new_like(const Tensor& x) {
  if (x.is_contiguous() || (x.dim() == 4 && is_dense(x, true)))
    return empty_strided(x, x.dim(), x.sizes().data(), x.strides().data());
  return torch::stable::empty_like(x);
}

// x's memory by other sizes and strides: a view, made as empty_strided makes a tensor.
template <size_t N>
Tensor seen_as(const Tensor& x, const std::array<int64_t, N>& sizes, const std::array<int64_t, N>& strides) {
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), N, sizes.data(), strides.data(), 0, &out));
  return Tensor(out);
}

// A dense NHWC image as a matrix of pixels by channels, and such a matrix as an image: views.
inline Tensor pixel_rows(const Tensor& x) {
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3), c = x.size(1);
  return seen_as<2>(x, {pixels, c}, {c, 1});
}
inline Tensor image_of_rows(const Tensor& rows, int64_t n, int64_t h, int64_t w) {
  const int64_t c = rows.size(1);
  return seen_as<4>(rows, {n, c, h, w}, image_strides(c, h, w, true));
}

// A pointwise filter (C', C, 1, 1) as the matrix (C', C), a view where it is dense; and a matrix as a filter.
inline Tensor as_matrix(const Tensor& filter) {
  const int64_t c_out = filter.size(0), c = filter.size(1);
  if (is_dense(filter, false)) return seen_as<2>(filter, {c_out, c}, {c, 1});
  return torch::stable::reshape(filter, std::vector<int64_t>{c_out, c});
}
inline Tensor as_filter(const Tensor& matrix) {
  return seen_as<4>(matrix, {matrix.size(0), matrix.size(1), 1, 1}, {matrix.stride(0), matrix.stride(1), 1, 1});
}

// Whether x has exactly the strides of the given format, those of sizes of 1 included.
inline bool has_strides(const Tensor& x, bool nhwc) {
  const std::array<int64_t, 4> strides = image_strides(x.size(1), x.size(2), x.size(3), nhwc);
  bool same = true;
  for (int64_t d = 0; d < 4; ++d) same = same && strides[d] == x.stride(d);
  return same;
}
// A dense image with the strides of the given format, in which it must be dense too: a view.
inline Tensor in_strides(const Tensor& x, bool nhwc) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  return seen_as<4>(x, {n, c, h, w}, image_strides(c, h, w, nhwc));
}
// x with the strides of the given format; x itself where it has them.
inline Tensor in_format(const Tensor& x, bool nhwc) {
  if (has_strides(x, nhwc)) return x;
  Tensor out = empty_image(x, x.size(0), x.size(1), x.size(2), x.size(3), nhwc);
  return torch::stable::copy_(out, x);
}

// dense() and in_format() by a device's own transposition, many times faster than PyTorch's copy between the formats.
// Device: struct with static transposed_image(x, nhwc), of an image that is dense in the other format.
template <class Device>
struct TransposedFormats {
  static Tensor dense(const Tensor& x, bool nhwc) {
    return is_dense(x, nhwc) || !is_dense(x, !nhwc) ? rkl::dense(x, nhwc) : Device::transposed_image(x, nhwc);
  }
  static Tensor in_format(const Tensor& x, bool nhwc) {
    return has_strides(x, nhwc) || !is_dense(x, !nhwc) ? rkl::in_format(x, nhwc) : Device::transposed_image(x, nhwc);
  }
};

// For a filter's gradient. (C, 1, kh, kw) has its elements in the same order in either format; the strides differ.
inline Tensor empty_filter(const Tensor& weight) {
  return empty_image(weight, weight.size(0), weight.size(1), weight.size(2), weight.size(3), suggests_nhwc(weight));
}

inline Tensor empty_vector(const Tensor& like, int64_t n) {
  const int64_t stride = 1;
  return empty_strided(like, 1, &n, &stride);
}

// Whether two tensors of one shape have their elements in the same places (strides of sizes of 1 do not count).
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// x laid out like the dense tensor `layout` of the same shape; x itself where it is so already.
inline Tensor laid_out_like(const Tensor& x, const Tensor& layout) {
  if (same_strides(x, layout)) return x;
  Tensor out = new_like(layout);
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
  STD_TORCH_CHECK(x.size(1) > 0, "x must have at least one channel");
  // Computed in 64 bits. Kernels count pixels of the padded image in 32 bits, so it must be smaller than that.
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  std::array<int64_t, 2> out, step, apart;
  for (int d : {0, 1}) {
    const int64_t taps = weight.size(2 + d), in = x.size(2 + d);
    STD_TORCH_CHECK(in > 0 || !x.size(0), "x must have at least one pixel");
    STD_TORCH_CHECK(taps > 0 && stride[d] > 0 && dilation[d] > 0 && padding[d] >= 0,
                    "kernel, stride and dilation must be positive and padding not negative");
    STD_TORCH_CHECK(stride[d] <= kMost && dilation[d] <= kMost && padding[d] <= kMost && in <= kMost - 2 * padding[d],
                    "stride, dilation and the padded image must be below 2^31, got ", stride[d], ", ", dilation[d],
                    " and ", in, " padded by ", padding[d]);
    const int64_t free = in + 2 * padding[d] - dilation[d] * (taps - 1) - 1;
    STD_TORCH_CHECK(free >= 0, "the dilated filter must fit into the padded image");
    out[d] = free / stride[d] + 1;
    step[d] = stride[d] < free + 1 ? stride[d] : free + 1;  // one output needs no larger step; buffers depend on it
    apart[d] = taps > 1 ? dilation[d] : 1;                  // likewise of one tap, whose dilation has no other bound
  }
  const Conv2d g{x.size(0),
                 x.size(1),
                 x.size(2),
                 x.size(3),
                 out[0],
                 out[1],
                 int(weight.size(2)),
                 int(weight.size(3)),
                 int(step[0]),
                 int(step[1]),
                 int(padding[0]),
                 int(padding[1]),
                 int(apart[0]),
                 int(apart[1]),
                 suggests_nhwc(x) || suggests_nhwc(weight)};
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
  return x ? std::optional<Tensor>(as_contiguous(*x)) : std::nullopt;
}

inline const void* data_or_null(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

}  // namespace rkl
