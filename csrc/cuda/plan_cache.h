// Remembers the plans that a thread has made. Planning an output weighs up to hundreds of cuts and takes 8 to 10 us on
// one core of an AMD EPYC, as long as all else that a call costs the host. A network repeats the same few shapes.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>

#include "cuda/plan.h"

namespace rkl::cuda {

// Everything that a plan is made from, as numbers.
using PlanKey = std::array<int64_t, 24>;

// rest: what a plan depends on beside the geometry, the type, the alignment and the device.
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
      hash = (hash ^ uint64_t(number)) * 0x9e3779b97f4a7c15u;  // odd, half of its bits ones
      hash ^= hash >> 32;
    }
    return hash;
  }
};

// The plan of that key: the one that this thread remembers, or else make()'s. Each call site, whose lambda is a type F
// of its own, has its own memory, so that keys need differ only within one call site.
template <class F>
MaybePlan remembered(const PlanKey& key, F make) {
  // Room for a few networks: a layer in NCHW asks for 6 to 8 plans; MobileNetV2 has 68 to 72 different plans,
  // EfficientNet-B0 88 to 92. Where shapes never repeat, all plans are forgotten when the map is full. A plan is found
  // in 30 ns, however many there are; a linear search through 92 took 104 ns.
  constexpr size_t kMostPlans = 512;
  thread_local std::unordered_map<PlanKey, MaybePlan, PlanKeyHash> plans;
  if (const auto found = plans.find(key); found != plans.end()) return found->second;
  if (plans.size() >= kMostPlans) plans.clear();
  return plans[key] = make();
}

}  // namespace rkl::cuda
