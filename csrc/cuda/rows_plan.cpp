// Which of the row pipeline's kernels serves a convolution, and how it is cut.
#include "cuda/rows_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

namespace rkl::cuda {
namespace rows {
namespace {

// The most images that a strip may touch. Its row of inputs has room for the halos of so many.
int images_of_a_strip(int octets) { return octets == 1 ? kOctets : octets % kOctets ? 2 : 1; }

// How many groups of 8 channels a block has: of the numbers that leave the fewest groups idle, the largest. 728
// channels are 13 blocks of 7 groups.
int groups_of_a_block(int groups, int most) {
  if (groups <= most) return groups;
  int best = most;
  for (int n = most; 2 * n > most; --n)
    if (round_up(groups, n) < round_up(groups, best)) best = n;
  return best;
}

}  // namespace

Tiling tiling(const Conv2d& g, const Kernel& kernel, int images, int rows) {
  Tiling t{};
  t.batch = images, t.channels = int(g.channels);
  t.in_h = int(g.in_h), t.in_w = int(g.in_w), t.out_h = int(g.out_h), t.out_w = int(g.out_w);
  t.kernel_h = g.kernel_h, t.kernel_w = g.kernel_w, t.padding_h = g.padding_h, t.padding_w = g.padding_w;
  t.dilation_h = g.dilation_h, t.dilation_w = g.dilation_w;
  const int groups = int(ceil_div(g.channels, 8));
  t.groups = groups_of_a_block(groups, kernel.groups);
  t.pitch = t.groups | 1;
  t.channel_blocks = int(ceil_div(groups, t.groups));
  t.octets = int(ceil_div(g.out_w, kOctet));
  t.octet_pixels = kOctet * kernel.stride;
  // In 64 bits, since a dilation may be far larger than the image. No kernel has room for a row too wide for an int.
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  const int64_t halo = round_up((kernel.kernel_w - 1) * int64_t(g.dilation_w) + 1 - kernel.stride, kernel.stride);
  t.halo = int(std::min(halo, kMost));
  t.width = int(std::min(kOctets * t.octet_pixels + images_of_a_strip(t.octets) * halo, kMost));
  const int shared_octets = std::gcd(t.octets, kOctets);
  t.group_images = kOctets / shared_octets;
  t.group_strips = t.octets / shared_octets;
  t.groups_of_images = int(ceil_div(images, t.group_images));
  const int residue_rows = int(ceil_div(g.out_h, g.dilation_h));
  t.rows = std::min(rows, residue_rows);
  t.chunks = int(ceil_div(residue_rows, t.rows));
  return t;
}

int images_at_once(const Conv2d& g) {
  constexpr int64_t kMostElements = int64_t(1) << 31;
  if (g.channels * g.kernel_h * g.kernel_w >= kMostElements) return 0;
  const int64_t pixels = std::max(g.in_h * g.in_w, g.out_h * g.out_w);
  const int64_t by_elements = (kMostElements - 1) / std::max<int64_t>(1, pixels * g.channels);
  return int(std::min(by_elements, g.batch));
}

namespace {

// A compiled kernel, and the convolution that it computes: for stride 2's data gradient, the convolution of pairs.
struct Choice {
  int number = -1;
  Kernel kernel{};
  Conv2d tiled{};
};

// The smallest compiled kernel that the filter fits into and whose rows have room for its halo. tiled_by(kernel): the
// convolution that the kernel computes for g, and the kernel with the filter size of that convolution.
template <int count, class F>
Choice find(const Kernel (&kernels)[count], const Conv2d& g, F tiled_by) {
  Choice best;
  int least = 1 << 30;
  for (int i = 0; i < count; ++i) {
    const int size = kernels[i].kernel_h * kernels[i].kernel_w;
    if (kernels[i].kernel_h < g.kernel_h || kernels[i].kernel_w < g.kernel_w || kernels[i].stride != g.stride_h)
      continue;
    const auto [tiled, kernel] = tiled_by(kernels[i]);
    if (size >= least || tiling(tiled, kernel, 1, 1).width > 32 * kernel.slots) continue;
    best = {i, kernel, tiled};
    least = size;
  }
  return best;
}

// How many rows of 32 columns a kernel has in shared memory beside the ring of inputs: `stored` rows on their way out,
// and a second ring where it reads both images and gradients.
int shared_columns(const Choice& c, Result result, int stored) {
  const bool two_rings = result == Result::filter_grad || result == Result::both_grads;
  return stored + (two_rings ? c.kernel.ring() : 0);
}

MaybePlan plan_kernel(const Choice& c, Result result, const Conv2d& g, int stored, const Device& device) {
  const int images = images_at_once(g);
  if (c.number < 0 || !images) return std::nullopt;
  const Tiling whole = tiling(c.tiled, c.kernel, images, 1 << 30);
  Plan plan;
  plan.family = Family::rows;
  plan.kernel = c.number;
  plan.threads = 32 * whole.groups;
  plan.shared = c.kernel.ring() * whole.row_bytes() + shared_columns(c, result, stored) * whole.column_bytes();
  if (plan.shared > device.block_shared) return std::nullopt;
  const int64_t at_once = blocks_at_once(c.kernel.registers, plan, device);
  const int64_t height = ceil_div(c.tiled.out_h, c.tiled.dilation_h);
  const auto with = [&](int rows) { return tiling(c.tiled, c.kernel, images, rows); };
  if (result == Result::output || result == Result::data_grad) {
    cut_outputs(plan, height, c.kernel, at_once, with, output_cost);
  } else {
    cut_gradients(plan, height, c.kernel, at_once, with);
    plan.parts *= int(ceil_div(g.batch, images));  // each launch has parts of its own
  }
  return plan;
}

}  // namespace
}  // namespace rows

MaybePlan plan_rows(Result result, const Conv2d& g, Dtype dtype, const Device& device) {
  using namespace rows;
  if (dtype == Dtype::f32 || !g.nhwc || g.channels % 8 || g.stride_h != g.stride_w || g.stride_h > 2)
    return std::nullopt;
  if (g.stride_h == 2 && (g.dilation_h != 1 || g.dilation_w != 1)) return std::nullopt;
  const auto itself = [&](const Kernel& k) { return std::pair(g, k); };
  const auto gradient = [&](const Kernel& k) { return std::pair(data_grad_as_convolution(g), k); };
  const auto pairs = [&](const Kernel& k) {
    return std::pair(stride2_data_grad_as_pairs(g, k.kernel_h, k.kernel_w), halved(k));
  };
  switch (result) {
    case Result::output:
      return plan_kernel(find(kConvolutions, g, itself), result, g, 2, device);
    case Result::data_grad:
      if (g.stride_h == 2) return plan_kernel(find(kStride2DataGrads, g, pairs), result, g, 8, device);
      return plan_kernel(find(kConvolutions, g, gradient), result, g, 2, device);
    case Result::filter_grad:
      return plan_kernel(find(kFilterGrads, g, itself), result, g, 0, device);
    case Result::both_grads: {
      // The bias's gradient sums what meets the filter's middle tap. For each output that tap must fall on the image.
      const bool middle = g.padding_h <= g.dilation_h && g.padding_w <= g.dilation_w;
      if (g.stride_h != 1 || g.kernel_h != 3 || g.kernel_w != 3 || !middle) return std::nullopt;
      return plan_kernel(find(kBothGrads, g, gradient), result, g, 2, device);
    }
  }
  return std::nullopt;
}

}  // namespace rkl::cuda
