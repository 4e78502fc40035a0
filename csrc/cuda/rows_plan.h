// How the row pipeline's plans weigh rows a task against blocks, for its kernels and the fused separable ones.
#pragma once
#include <algorithm>

#include "cuda/rows.h"

namespace rkl::cuda::rows {

// What a task costs beside its own rows, in rows: those that it reads beyond them, the first copies' way, and, where it
// is at another place than the task before, finding out about its pixels (600 instructions; a row has 80).
constexpr int kWait = 2, kPlaces = 8;

// Blocks that the GPU has at a time.
inline int64_t blocks_at_once(int registers, const Plan& plan, const Device& device) {
  constexpr int kReserved = 1024, kThreads = 2048,
                kMost = 32;  // bytes of a block by CUDA itself; a multiprocessor's limits
  const int by_shared = device.multiprocessor_shared / (plan.shared + kReserved);
  const int blocks = std::min({65536 / (registers * plan.threads), by_shared, kThreads / plan.threads, kMost});
  return int64_t(std::max(1, blocks)) * device.multiprocessors;
}

// Blocks come in rounds of as many as the GPU has at once. Few rounds are whole ones; of many, half a one is idle at
// the end.
inline double rounds(int64_t blocks, int64_t at_once) {
  constexpr int kFew = 4;
  return blocks < kFew * at_once ? double(ceil_div(blocks, at_once)) : double(blocks) / double(at_once) + 0.5;
}

// Calls f with every number of rows that a task may have: whole maps, halves, thirds, ... of at least 7 rows.
template <class F>
void by_rows(int64_t height, F f) {
  constexpr int kLeast = 7;
  for (int64_t chunks = 1; chunks == 1 || ceil_div(height, chunks) >= kLeast; ++chunks)
    f(int(ceil_div(height, chunks)));
}

// Rows of a task and parts of the tasks (a block has every parts-th one) with which all are done soonest. With more
// than one task a block, these are at one place of different images. tiling_with: the tiling with so many rows.
template <class F>
void cut_outputs(Plan& plan, int64_t height, const Kernel& kernel, int64_t at_once, F tiling_with) {
  double least = 0;
  by_rows(height, [&](int rows) {
    const Tiling t = tiling_with(rows);
    for (int each = 1; each <= t.groups_of_images; each *= 2) {
      const int64_t parts = int64_t(t.places()) * ceil_div(t.groups_of_images, each);
      const double task = t.rows + kernel.kernel_h - 1 + kWait;
      const double time = rounds(t.blocks(parts), at_once) * (kPlaces + each * task);
      if (plan.rows && time >= least) continue;
      least = time;
      plan.rows = t.rows, plan.parts = int(parts), plan.blocks = t.blocks(parts);
      plan.steps = t.tasks() * t.channel_blocks * t.groups * (t.rows + in_flight(kernel.kernel_h, kernel.stride) - 1);
    }
  });
}

// The same for gradients, whose blocks stay until the end: as many parts as the GPU has blocks at once.
template <class F>
void cut_gradients(Plan& plan, int64_t height, const Kernel& kernel, int64_t at_once, F tiling_with) {
  double least = 0;
  by_rows(height, [&](int rows) {
    const Tiling t = tiling_with(rows);
    const int64_t most = std::max<int64_t>(1, at_once / t.channel_blocks), places = t.places();
    int64_t parts = ceil_div(t.tasks(), ceil_div(t.tasks(), most));
    if (parts > places) parts = std::min(ceil_div(parts, places), most / places) * places;
    const double each = double(ceil_div(t.tasks(), parts)), task = t.rows + kernel.kernel_h - 1 + kWait;
    const double time = each * task + kPlaces * (parts % places ? each : 1);
    if (plan.rows && time >= least) return;
    least = time;
    plan.rows = t.rows, plan.parts = int(parts), plan.blocks = t.blocks(parts);
    plan.steps = t.tasks() * t.channel_blocks * t.groups * (t.rows + in_flight(kernel.kernel_h, kernel.stride) - 1);
  });
}

}  // namespace rkl::cuda::rows
