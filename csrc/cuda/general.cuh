// What the general kernels share: where elements lie, and which element a tap reads.
#pragma once
#include "cuda/element.cuh"
#include "cuda/general.h"

namespace rkl::cuda::general {

// Where the pixels of an image lie: element (n, c, y, x) is at n * image + c * channel + y * row + x * pixel.
struct Strides {
  int64_t image, channel, row, pixel;
};

__host__ __device__ inline Strides strides_of(const Conv2d& g, int64_t h, int64_t w) {
  if (g.nhwc) return {h * w * g.channels, 1, w * g.channels, g.channels};
  return {g.channels * h * w, h * w, w, 1};
}

// Division of numbers below 2^52 by a number known at the launch. CUDA's 64-bit division is a function call, which
// spills registers.
struct Divider {
  int64_t d;
  double inverse;

  explicit Divider(int64_t d) : d(d), inverse(1.0 / double(d)) {}

  // Returns the remainder of i / d; i becomes the quotient.
  __device__ int remainder_of(int64_t& i) const {
    int64_t quotient = int64_t(double(i) * inverse), rest = i - quotient * d;
    const int off = rest < 0 ? -1 : rest >= d ? 1 : 0;  // the inverse is rounded: it misses by at most one
    i = quotient + off;
    return int(rest - off * d);
  }
};

// The position along one axis that output o reads with filter tap k. -1: it is outside, or between two strides.
template <bool transposed>
__device__ int source(int o, int k, int stride, int padding, int dilation, int size) {
  if (!transposed) {
    const int i = o * stride - padding + k * dilation;
    return i >= 0 && i < size ? i : -1;
  }
  const int i = o + padding - k * dilation;
  return i >= 0 && i % stride == 0 && i / stride < size ? i / stride : -1;
}

}  // namespace rkl::cuda::general
