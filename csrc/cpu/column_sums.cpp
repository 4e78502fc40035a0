// The bias's gradient of a pointwise step.
#include <torch/csrc/stable/ops.h>

#include "cpu/element.h"
#include "cpu/kernels.h"

namespace rkl::cpu {

void column_sums(const void* matrix, void* out, int64_t rows, int64_t channels, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(matrix);
    T* to = static_cast<T*>(out);
    torch::stable::parallel_for(0, channels, 16, [=](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        double sum = 0;
        for (int64_t r = 0; r < rows; ++r) sum += float(in[r * channels + c]);
        to[c] = T(float(sum));
      }
    });
  });
}

}  // namespace rkl::cpu
