// Sums over bands: each task has its own, and they are added in the tasks' order, so that results do not depend on the
// number of threads.
#pragma once
#include <vector>

#include "cpu/separable_band.h"

namespace rkl::cpu {

// The pointwise filter's gradient, in fp32 within a task and in fp64 between tasks.
class TaskSums {
 public:
  TaskSums() = default;
  TaskSums(int64_t tasks, int64_t size) : tasks_(tasks), size_(size), sums_(tasks * size * int64_t(sizeof(float))) {}

  // A band's share; a task's first one is taken as it is.
  void add(int64_t task, bool first, const Matrix& share) {
    const float* from = static_cast<const float*>(share.data);
    float* sums = sums_.as<float>() + task * size_;
    for (int64_t i = 0; i < size_; ++i) sums[i] = first ? from[i] : sums[i] + from[i];
  }

  void round_into(void* out, Dtype dtype) const {
    constexpr int64_t part = 4096;
    torch::stable::parallel_for(0, (size_ + part - 1) / part, 8, [&](int64_t begin, int64_t end) {
      std::vector<double> total(part);
      for (int64_t first = begin * part; first < std::min(end * part, size_); first += part) {
        const int64_t count = std::min(part, size_ - first);
        std::fill(total.begin(), total.end(), 0.);
        for (int64_t task = 0; task < tasks_; ++task) {
          const float* from = sums_.as<float>() + task * size_ + first;
          for (int64_t i = 0; i < count; ++i) total[i] += from[i];
        }
        kernels(dtype).round(total.data(), at(out, first, dtype), count, dtype);
      }
    });
  }

 private:
  int64_t tasks_ = 0, size_ = 0;
  Scratch sums_;
};

// The pointwise bias's gradient from the tasks' sums (task, channel).
inline void round_bias(const std::vector<double>& sums, int64_t channels, void* out, Dtype dtype) {
  std::vector<double> total(channels);
  for (size_t i = 0; i < sums.size(); ++i) total[i % channels] += sums[i];
  kernels(dtype).round(total.data(), out, channels, dtype);
}

}  // namespace rkl::cpu
