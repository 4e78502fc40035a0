// How plans of the row pipeline, and of the fused separable kernels, choose between tall tasks and many blocks.
#pragma once
#include <algorithm>

#include "cuda/rows.h"

namespace rkl::cuda::rows {

// How many blocks run on the GPU at a time.
inline int64_t blocks_at_once(int registers, const Plan& plan, const Device& device) {
  const int blocks = std::min({kRegistersOfAll / (registers * plan.threads), device.blocks_by_shared(plan.shared),
                               device.multiprocessor_threads / plan.threads, device.multiprocessor_blocks});
  return int64_t(std::max(1, blocks)) * device.multiprocessors;
}

// The cost of a cut, in the time of a row. Its constants are fitted to 1,500 cuts of benchmarks/shapes.py timed on an
// H100; the cuts that it chooses are 2.5 % off the best of these on average.

// What is added to the cost of the rows. kWait: a task waits for its first copies. kPlace: a task at another place than
// the one before computes its pixels' addresses anew. kSums: a gradient's block writes its sums.
constexpr int kWait = 1, kPlace = 4, kSums = 10;

// Blocks drift apart while they run, and then neighbours share neither their halos in the cache nor DRAM's open pages.
// With a 3 x 3 filter, blocks of 10 rows took 87 % of the time of one round of taller blocks (147 px). Filters of more
// rows wait for the tensor cores, not for memory.
inline double drift(const Tiling& t, const Kernel& kernel, int each, double a_row, int most) {
  if (kernel.kernel_h > 3 || t.dilation_h > 1) return 1;
  return 1 + a_row * std::min(each * t.rows * kernel.stride, most);
}

// Calls f with every number of rows that a task may have: whole maps, halves, thirds, ... of at least 4 rows.
template <class F>
void by_rows(int64_t height, F f) {
  constexpr int kLeast = 4;
  for (int64_t chunks = 1; chunks == 1 || ceil_div(height, chunks) >= kLeast; ++chunks)
    f(int(ceil_div(height, chunks)));
}

inline void take(Plan& plan, const Tiling& t, const Kernel& kernel, int64_t parts) {
  plan.rows = t.rows, plan.parts = int(parts), plan.blocks = t.blocks(parts);
  plan.steps = t.tasks() * t.channel_blocks * t.groups * (t.rows + in_flight(kernel.kernel_h, kernel.stride) - 1);
}

// The cost of all blocks, each of which makes the outputs of `each` tasks of the tiling.
inline double output_cost(const Tiling& t, const Kernel& kernel, int each, double blocks_over_at_once) {
  const double rounds = blocks_over_at_once + 0.5;  // half a round is idle at the end
  return rounds * (kPlace + each * (t.rows + kWait)) * drift(t, kernel, each, 0.03, 30);
}

// Chooses the rows of a task and the number of parts (a block makes every parts-th task) that cost least. If a block
// has several tasks, they are at one place of different images. tiling_with(rows): the tiling with so many rows a task.
template <class F, class Cost>
void cut_outputs(Plan& plan, int64_t height, const Kernel& kernel, int64_t at_once, F tiling_with, Cost cost) {
  double least = 0;
  by_rows(height, [&](int rows) {
    const Tiling t = tiling_with(rows);
    for (int each = 1; each <= t.groups_of_images; each *= 2) {
      const int64_t parts = int64_t(t.places()) * ceil_div(t.groups_of_images, each);
      const double time = cost(t, kernel, each, double(t.blocks(parts)) / double(at_once));
      if (plan.rows && time >= least) continue;
      least = time;
      take(plan, t, kernel, parts);
    }
  });
}

// The same for filter gradients, whose blocks keep their sums to the end: parts for one, two or four rounds of blocks.
template <class F>
void cut_gradients(Plan& plan, int64_t height, const Kernel& kernel, int64_t at_once, F tiling_with) {
  double least = 0;
  by_rows(height, [&](int rows) {
    const Tiling t = tiling_with(rows);
    const double task = t.rows + kWait + 0.5 * (kernel.kernel_h - 1) / kernel.stride;
    for (int rounds = 1; rounds <= 4; rounds *= 2) {
      const int64_t most = std::max<int64_t>(1, rounds * at_once / t.channel_blocks), places = t.places();
      int64_t parts = ceil_div(t.tasks(), ceil_div(t.tasks(), most));
      if (parts > places) parts = std::min(ceil_div(parts, places), most / places) * places;
      const int each = int(ceil_div(t.tasks(), parts)), moves = parts % places ? each : 1;
      const double share = double(t.blocks(parts)) / double(at_once), passes = share > 1 ? share + 0.2 : 1;
      const double time = passes * (kSums + kPlace * moves + each * task) * drift(t, kernel, each, 0.004, 1 << 30);
      if (plan.rows && time >= least) continue;
      least = time;
      take(plan, t, kernel, parts);
    }
  });
}

}  // namespace rkl::cuda::rows
