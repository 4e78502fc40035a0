// Which input pixels an output pixel reads: one description for the convolution and for its data gradient, so that both
// run through the same kernels. Every pixel of the output gathers; nothing is ever scattered.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "geometry.h"

namespace rkl::cpu {

// One dimension. Outputs phase, phase + phases, phase + 2 * phases, ... use the same taps: the i-th of them reads input
// i * step + offset + t * distance through the filter's tap + t * apart, where that lies inside the image.
struct Axis {
  int64_t count = 0;
  int step = 1, taps = 0, tap = 0, apart = 1;
  int64_t offset = 0, distance = 1;
};

struct Gather {
  std::vector<Axis> vertical, horizontal;  // one Axis for each phase
  int64_t in_h, in_w, out_h, out_w;
};

// How many neighbouring pixels of a row of NHWC images can count as one pixel whose channels are a multiple of `whole`.
// They can under a filter one column wide at stride 1, which reads each column by itself; else this is 1.
inline int64_t pixels_as_channels(const Conv2d& g, int64_t whole) {
  const int64_t pixels = whole / std::gcd(g.channels, whole);
  const bool apart = g.nhwc && g.kernel_w == 1 && g.stride_w == 1 && !g.padding_w;
  return apart && g.in_w % pixels == 0 ? pixels : 1;
}

// Output (i + padding - k * dilation) / stride, where that is whole, read input pixel i through tap k. Which k those
// are depends on i modulo the stride alone. So a stride of 2 makes 2 dense convolutions, each of about half the taps.
inline std::vector<Axis> gradient_axes(int64_t in, int kernel, int stride, int padding, int dilation) {
  const int shared = std::gcd(stride, dilation);
  std::vector<Axis> axes(std::min<int64_t>(stride, in), {0, 1, 0, 0, -stride / shared, 0, dilation / shared});
  for (int64_t phase = 0; phase < int64_t(axes.size()); ++phase) {
    Axis& axis = axes[phase];
    axis.count = ceil_div(in - phase, stride);
    for (int k = kernel - 1; k >= 0; --k) {
      const int64_t from = phase + padding - int64_t(k) * dilation;
      if (from % stride == 0 && !axis.taps++) axis.tap = k, axis.offset = from / stride;
    }
  }
  return axes;
}

inline Gather forward_gather(const Conv2d& g) {
  const Axis down{g.out_h, g.stride_h, g.kernel_h, 0, 1, -int64_t(g.padding_h), g.dilation_h};
  const Axis across{g.out_w, g.stride_w, g.kernel_w, 0, 1, -int64_t(g.padding_w), g.dilation_w};
  return {{down}, {across}, g.in_h, g.in_w, g.out_h, g.out_w};
}

inline Gather gradient_gather(const Conv2d& g) {
  const auto down = gradient_axes(g.in_h, g.kernel_h, g.stride_h, g.padding_h, g.dilation_h);
  const auto across = gradient_axes(g.in_w, g.kernel_w, g.stride_w, g.padding_w, g.dilation_w);
  return {down, across, g.out_h, g.out_w, g.in_h, g.in_w};
}

}  // namespace rkl::cpu
