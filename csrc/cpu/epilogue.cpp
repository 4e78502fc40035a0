// What stands around the pointwise step's matrix product: bias and activation, its gradient, the bias's gradient.
#include <torch/csrc/stable/ops.h>

#include "activation.h"
#include "cpu/element.h"
#include "cpu/kernels.h"

namespace rkl::cpu {
namespace {
constexpr int64_t kGrain = 16384;  // elements a task at least
}

void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *in = static_cast<const T*>(z), *b = static_cast<const T*>(bias);
    T* to = static_cast<T*>(out);
    torch::stable::parallel_for(0, rows, kGrain / channels + 1, [=](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < channels; ++c)
          to[r * channels + c] = T(activate(act, float(in[r * channels + c]) + (b ? float(b[c]) : 0.f)));
    });
  });
}

void slope(const void* grad, const void* values, Activation act, bool from_output, void* out, int64_t n, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *g = static_cast<const T*>(grad), *v = static_cast<const T*>(values);
    T* to = static_cast<T*>(out);
    torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float value = float(v[i]);
        to[i] = T(float(g[i]) * (from_output ? slope_from_output(act, value) : slope_from_input(act, value)));
      }
    });
  });
}

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
