// Images from NCHW to NHWC and back: PyTorch's own copy between the formats moves single elements.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/simd/scratch.h"

namespace rkl::cpu {

void transpose_images(const void* from, void* to, bool to_nhwc, int64_t batch, int64_t channels, int64_t pixels,
                      Dtype dtype) {
  const Kernels& k = kernels(dtype);
  // A part is as many pixels as hold some 64 Ki elements, which take some 10 us.
  const int64_t part = std::clamp<int64_t>((int64_t(1) << 16) / channels, 64, std::max<int64_t>(64, pixels));
  const int64_t parts = ceil_div(pixels, part), grain = kGrain / (part * channels) + 1;
  torch::stable::parallel_for(0, batch * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / parts * channels * pixels, first = i % parts * part;
      const int64_t count = std::min(part, pixels - first), plane = image + first, row = image + first * channels;
      if (to_nhwc)
        k.planes_to_rows(at(from, plane, dtype), pixels, at(to, row, dtype), channels, channels, count);
      else
        k.rows_to_planes(at(from, row, dtype), channels, at(to, plane, dtype), pixels, channels, count);
    }
  });
}

}  // namespace rkl::cpu
