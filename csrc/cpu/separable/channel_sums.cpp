// The sums of an image's channels: the gradient of a pointwise bias.
#include "cpu/separable/pointwise.h"
#include "cpu/separable/task_sums.h"

namespace rkl::cpu {

void channel_sums(const void* image, void* out, int64_t pixels, int64_t channels, Dtype dtype) {
  // In parts of as many pixels as lie in a core's own cache.
  const int64_t part = std::max<int64_t>(64, (int64_t(1) << 16) / channels);
  const int64_t parts = ceil_div(pixels, part), tasks = std::min<int64_t>(parts, 2 * kTasks);
  std::vector<double> sums(tasks * channels);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for (int64_t i = parts * task / tasks; i < parts * (task + 1) / tasks; ++i)
        kernels(dtype).add_column_sums(at(image, i * part * channels, dtype), sums.data() + task * channels,
                                       std::min(part, pixels - i * part), channels);
  });
  round_bias(sums, channels, out, dtype);
}

}  // namespace rkl::cpu
