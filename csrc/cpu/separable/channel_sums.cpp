// The sums of an image's channels: the gradient of a pointwise bias.
#include "cpu/separable/pointwise.h"
#include "cpu/separable/task_sums.h"

namespace rkl::cpu {

void channel_sums(const void* image, void* out, int64_t batch, int64_t pixels, int64_t channels, bool nhwc,
                  Dtype dtype) {
  // NHWC: rows of channels, as many as lie in a core's own cache. NCHW: whole images.
  const int64_t rows = nhwc ? batch * pixels : batch;
  const int64_t part = nhwc ? std::max<int64_t>(64, (int64_t(1) << 16) / channels) : 1;
  const int64_t parts = ceil_div(rows, part), tasks = std::min<int64_t>(parts, 2 * kTasks);
  std::vector<double> sums(tasks * channels);
  for_tasks(tasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for (int64_t i = parts * task / tasks; i < parts * (task + 1) / tasks; ++i) {
        double* to = sums.data() + task * channels;
        if (nhwc)
          kernels(dtype).add_column_sums(at(image, i * part * channels, dtype), to, std::min(part, rows - i * part),
                                         channels, dtype);
        else
          kernels(dtype).add_row_sums(at(image, i * channels * pixels, dtype), to, channels, pixels, dtype);
      }
  });
  round_bias(sums, channels, out, dtype);
}

}  // namespace rkl::cpu
