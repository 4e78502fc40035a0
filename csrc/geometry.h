// The shape of a convolution, and the element types: what kernels are told beside pointers. No torch in here, so that
// kernels compile alone (the tests' emulator does so).
#pragma once
#include <cstdint>

namespace rkl {

enum class Dtype : int { f32 = 0, bf16, f16 };

constexpr int size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }  // bytes of an element

// Call f with a value of the element type as argument: by_type<Bf16, F16>(dtype, [&](auto zero) { using T =
// decltype(zero); ... }). The 16-bit types are those of the processor that asks.
template <class Bf16, class F16, class F>
void by_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float{});
    case Dtype::bf16:
      return f(Bf16{});
    case Dtype::f16:
      return f(F16{});
  }
}

// A depthwise convolution of a batch of images. Images, outputs and gradients all have one layout: NHWC (channels_last)
// or NCHW, dense. Filters are (C, kernel_h, kernel_w), dense.
struct Conv2d {
  int64_t batch, channels;
  int64_t in_h, in_w, out_h, out_w;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  bool nhwc;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace rkl
