// Plans that a thread has made before. To plan an output weighs up to hundreds of cuts, 8 to 10 us on one core of an
// AMD EPYC, as long as all else that a call costs the host; and a network calls with the same few shapes again and
// again.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>

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

struct PlanKeyHash {
  size_t operator()(const PlanKey& key) const {
    uint64_t hash = 0;
    for (const int64_t number : key) {
      hash = (hash ^ uint64_t(number)) * 0x9e3779b97f4a7c15u;  // odd, its bits half ones
      hash ^= hash >> 32;
    }
    return hash;
  }
};

// The plan of that key: the one that this thread remembers, or what make() says. Each place that calls has a memory of
// its own, so that keys of one place alone must differ.
template <class F>
MaybePlan remembered(const PlanKey& key, F make) {
  // Those of a few networks: a layer in NCHW asks for 6 to 8, which makes 68 to 72 different ones of MobileNetV2 and
  // 88 to 92 of EfficientNet-B0. Where shapes have no end, all are forgotten when it is full. One is found in 30 ns,
  // however many there are; to look through 92 in a row took 104 ns.
  constexpr size_t kMostPlans = 512;
  thread_local std::unordered_map<PlanKey, MaybePlan, PlanKeyHash> plans;
  if (const auto found = plans.find(key); found != plans.end()) return found->second;
  if (plans.size() >= kMostPlans) plans.clear();
  return plans[key] = make();
}

}  // namespace rkl::cuda
