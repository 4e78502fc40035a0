// Whether a separable convolution is one kernel, and how it is cut.
#include <algorithm>
#include <cmath>

#include "cuda/kernels.h"
#include "cuda/plan_cache.h"
#include "cuda/rows_plan.h"
#include "cuda/separable_rows.h"

namespace rkl::cuda {

rows::Tiling separable_tiling(const Conv2d& g, const SeparableKernel& kernel, int images, int task_rows) {
  rows::Tiling t = rows::tiling(g, kernel.window, images, task_rows);
  // One block has all channels, and an even number of warps: half of them for each 16 pixels of the product.
  t.groups = std::max(2, int(ceil_div(g.channels, 16)) * 2);
  t.pitch = t.groups | 1;
  t.channel_blocks = 1;
  return t;
}

SeparableTiling separable_outputs(const SeparableKernel& kernel, int64_t outputs) {
  return {int(outputs), 2 * kernel.deep | 1, int(ceil_div(outputs, 16)) * 2 | 1};
}

namespace {

// Every block loads the pointwise filters, so few blocks of many rows are best: one round of blocks, if they fit.
double cost(const rows::Tiling& t, const rows::Kernel& kernel, int each, double blocks_over_at_once) {
  constexpr double kFilters = 8, kFew = 4;
  const double rounds = blocks_over_at_once < kFew ? std::ceil(blocks_over_at_once) : blocks_over_at_once + 0.5;
  return rounds * (kFilters + each * (t.rows + kernel.kernel_h + rows::kWait));
}

// The first of the compiled kernels that serves.
MaybePlan find(const Conv2d& g, int64_t outputs, const Device& device) {
  const int images = std::min(rows::images_at_once(g), rows::images_at_once(outputs_of(g, outputs)));
  if (!images) return std::nullopt;
  constexpr int kCount = sizeof(kSeparableKernels) / sizeof(SeparableKernel);
  for (int i = 0; i < kCount; ++i) {
    const SeparableKernel& k = kSeparableKernels[i];
    const rows::Tiling whole = separable_tiling(g, k, images, 1 << 30);
    const int slices = whole.groups / 2;
    if (k.window.kernel_h != g.kernel_h || k.window.stride != g.stride_h) continue;
    if (whole.groups > 2 * k.deep || ceil_div(outputs, 16) > k.wide * slices || whole.width > 32 * k.window.slots)
      continue;
    const SeparableTiling out = separable_outputs(k, outputs);
    Plan plan;
    plan.family = Family::rows;
    plan.kernel = i;
    plan.threads = 32 * whole.groups;
    plan.shared = k.window.ring() * whole.row_bytes() + 2 * (out.hidden_bytes() + out.output_bytes());
    if (plan.shared > device.block_shared) continue;
    const int64_t at_once = rows::blocks_at_once(k.window.registers, plan, device);
    const auto tiling = [&](int rows) { return separable_tiling(g, k, images, rows); };
    rows::cut_outputs(plan, g.out_h, k.window, at_once, tiling, cost);
    return plan;
  }
  return std::nullopt;
}

}  // namespace

MaybePlan plan_separable(const Conv2d& g, int64_t outputs, Activation inner, Activation act, Dtype dtype, bool aligned,
                         const Device& device) {
  const bool plain = g.kernel_h == g.kernel_w && g.stride_h == g.stride_w && g.dilation_h == 1 && g.dilation_w == 1;
  if (dtype == Dtype::f32 || !g.nhwc || !aligned || !plain || g.channels % 8 || outputs % 8) return std::nullopt;
  if (!rows::is_short(inner) || !rows::is_short(act)) return std::nullopt;
  return remembered(plan_key(g, dtype, aligned, device, outputs), [&] { return find(g, outputs, device); });
}

}  // namespace rkl::cuda
