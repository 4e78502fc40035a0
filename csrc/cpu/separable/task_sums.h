// Sums over bands: each task has its own, and they are added in the tasks' order, so that results do not depend on the
// number of threads.
#pragma once
#include <vector>

#include "cpu/separable/band.h"

namespace rkl::cpu {

// The sum of `count` parts of `size` elements, in their order and in fp64. values(i, first, n, buffer) are n elements
// of the i-th part, which may be put into the buffer.
template <class Values>
void round_sum(int64_t count, int64_t size, void* out, Dtype dtype, Values&& values) {
  constexpr int64_t piece = 4096;
  torch::stable::parallel_for(0, ceil_div(size, piece), 8, [&](int64_t begin, int64_t end) {
    std::vector<double> total(piece);
    std::vector<float> buffer(piece);
    for (int64_t first = begin * piece; first < std::min(end * piece, size); first += piece) {
      const int64_t n = std::min(piece, size - first);
      std::fill(total.begin(), total.end(), 0.);
      for (int64_t part = 0; part < count; ++part) {
        const float* from = values(part, first, n, buffer.data());
        for (int64_t i = 0; i < n; ++i) total[i] += from[i];
      }
      kernels(dtype).round(total.data(), at(out, first, dtype), n, dtype);
    }
  });
}

// The pointwise filter's gradient, in fp32 within a task and in fp64 between tasks.
class TaskSums {
 public:
  TaskSums(int64_t tasks, int64_t size) : tasks_(tasks), size_(size), sums_(tasks * size * int64_t(sizeof(float))) {}

  // A band's share; a task's first one is taken as it is.
  void add(int64_t task, bool first, const Matrix& share) {
    const float* from = static_cast<const float*>(share.data);
    float* sums = sums_.as<float>() + task * size_;
    for (int64_t i = 0; i < size_; ++i) sums[i] = first ? from[i] : sums[i] + from[i];
  }

  void round_into(void* out, Dtype dtype) const {
    round_sum(tasks_, size_, out, dtype,
              [&](int64_t task, int64_t first, int64_t, float*) { return sums_.as<float>() + task * size_ + first; });
  }

 private:
  int64_t tasks_, size_;
  Scratch sums_;
};

// The pointwise bias's gradient from the tasks' sums (task, channel).
inline void round_bias(const std::vector<double>& sums, int64_t channels, void* out, Dtype dtype) {
  std::vector<double> total(channels);
  for (size_t i = 0; i < sums.size(); ++i) total[i % channels] += sums[i];
  kernels(dtype).round(total.data(), out, channels, dtype);
}

}  // namespace rkl::cpu
