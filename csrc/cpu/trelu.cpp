// T-ReLU on the CPU.
#include <torch/csrc/stable/ops.h>

#include "activation.h"
#include "cpu/element.h"
#include "cpu/kernels.h"

namespace rkl::cpu {
namespace {
constexpr int64_t kGrain = 32768;  // elements a task at least: below, waking a thread costs more than it saves
}

void trelu(const void* x, void* y, int64_t n, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(x);
    T* out = static_cast<T*>(y);
    torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) out[i] = T(rkl::trelu(float(in[i])));
    });
  });
}

void trelu_backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* g = static_cast<const T*>(grad);
    const T* out = static_cast<const T*>(y);
    T* in = static_cast<T*>(dx);
    torch::stable::parallel_for(0, n, kGrain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) in[i] = T(float(g[i]) * trelu_slope(float(out[i])));
    });
  });
}

}  // namespace rkl::cpu
