// Plans that a thread has made before. To plan an output weighs up to hundreds of cuts, 8 to 10 us on one core of an
// AMD EPYC, as long as all else that a call costs the host; and a network calls with the same few shapes again and
// again.
#pragma once
#include <array>
#include <cstddef>

#include "cuda/plan.h"

namespace rkl::cuda {

// Everything that a plan is made from, as numbers.
using PlanKey = std::array<int64_t, 24>;

// rest: what a plan is told beside the geometry, the type, the alignment and the device.
inline PlanKey plan_key(const Conv2d& g, Dtype dtype, bool aligned, const Device& d, int64_t rest) {
  return {g.batch,
          g.channels,
          g.in_h,
          g.in_w,
          g.out_h,
          g.out_w,
          g.kernel_h,
          g.kernel_w,
          g.stride_h,
          g.stride_w,
          g.padding_h,
          g.padding_w,
          g.dilation_h,
          g.dilation_w,
          g.nhwc,
          int64_t(dtype),
          aligned,
          d.capability,
          d.multiprocessors,
          d.block_shared,
          d.multiprocessor_shared,
          d.multiprocessor_threads,
          d.multiprocessor_blocks,
          rest};
}

// The plan of that key: the one that this thread remembers, or what make() says. Each place that calls has a memory of
// its own, so that keys of one place alone must differ.
template <class F>
MaybePlan remembered(const PlanKey& key, F make) {
  struct Entry {
    PlanKey key{};  // nobody's at first: a filter has at least one row
    MaybePlan plan;
  };
  constexpr size_t kEntries = 64;  // the shapes of a network and of its backward; the oldest makes way
  thread_local std::array<Entry, kEntries> entries;
  thread_local size_t next = 0;
  for (const Entry& one : entries)
    if (one.key == key) return one.plan;
  Entry& made = entries[next++ % kEntries];
  made = {key, make()};
  return made.plan;
}

}  // namespace rkl::cuda
