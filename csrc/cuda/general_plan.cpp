// How the general kernels cut a convolution.
#include <algorithm>
#include <cstdlib>

#include "cuda/general.h"

namespace rkl::cuda {
namespace general {
namespace {

// Whether 32 bits hold the columns of a thread's neighbouring outputs and of their inputs, even past a row's ends.
bool counts_neighbours(const Conv2d& g) {
  constexpr int64_t kMost = int64_t(1) << 31;
  return std::max(g.in_w, g.out_w) + std::abs(g.padding_w) + int64_t(g.dilation_w) * (g.kernel_w + kSums) < kMost;
}

bool slides(const Conv2d& g) { return g.nhwc && g.stride_w == 1 && counts_neighbours(g); }

Plan plan_filter_grad(const Conv2d& g, const Device& device) {
  const int64_t channel_blocks = g.nhwc ? ceil_div(g.channels, kChannelsAside) : g.channels;
  const int64_t groups = ceil_div(g.kernel_w, taps_across(g.kernel_w)) * ceil_div(g.kernel_h, taps_down(g.kernel_w));
  Plan plan{Family::general};
  plan.kernel = slides(g) ? kSliding : kApart;
  plan.parts = filter_grad_parts(g, channel_blocks, device);
  // At least a row for each of the threads that share a channel.
  if (slides(g))
    plan.parts = int(std::min<int64_t>(plan.parts, ceil_div(g.batch * g.out_h, kThreads / kChannelsAside)));
  plan.blocks = channel_blocks * groups * plan.parts;
  plan.threads = kThreads;
  return plan;
}

// Plans a convolution or, if transposed, a data gradient.
Plan plan_output(const Conv2d& g, bool transposed, Dtype dtype, bool aligned, const Device& device) {
  const int64_t height = transposed ? g.in_h : g.out_h, width = transposed ? g.in_w : g.out_w;
  const int vector = vector_of(size_of(dtype)), outputs = outputs_of(size_of(dtype));
  const int64_t row_bytes = int64_t(g.kernel_w) * kTapBytes;
  Plan plan{Family::general};
  plan.threads = kThreads;
  if (!g.nhwc || g.channels % vector || !aligned || row_bytes > device.block_shared || !counts_neighbours(g)) {
    plan.kernel = kScalars;
    plan.blocks = ceil_div(g.batch * height * width * g.channels, kThreads);
    return plan;
  }
  plan.kernel = !transposed && slides(g) ? kSliding : kApart;
  plan.rows = int(std::clamp<int64_t>(kStaged / row_bytes, 1, g.kernel_h));
  plan.shared = int(plan.rows * row_bytes);
  const Row row(width, plan.kernel == kSliding ? g.dilation_w : 1, outputs);
  plan.blocks = ceil_div(g.channels, kVectors * vector) * ceil_div(g.batch * height * row.groups, kThreads / kVectors);
  return plan;
}

}  // namespace
}  // namespace general

// Plan::kernel is a general::Kernel; Plan::rows counts the filter's rows that are in shared memory at once.
Plan plan_general(Result result, const Conv2d& g, Dtype dtype, bool aligned, const Device& device) {
  if (result == Result::filter_grad) return general::plan_filter_grad(g, device);
  if (result == Result::output) return general::plan_output(g, false, dtype, aligned, device);
  const bool convolves = g.stride_h == 1 && g.stride_w == 1;
  return general::plan_output(convolves ? data_grad_as_convolution(g) : g, !convolves, dtype, aligned, device);
}

}  // namespace rkl::cuda
