// Which instruction set's kernels serve this process.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace rkl::cpu {

namespace baseline {
extern const Kernels kernels;
}

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

struct Chosen {
  const Kernels *any, *bf16;
};

#if defined(__x86_64__)
// The instructions for bf16 make zeros of denormal numbers: fine after a sum, but T-ReLU gives back what is positive.
const Kernels& with_bf16() {
  static const Kernels merged = [] {
    Kernels merged = avx512_bf16::kernels;
    merged.trelu = avx512::kernels.trelu;
    merged.trelu_backward = avx512::kernels.trelu_backward;
    return merged;
  }();
  return merged;
}
#endif

Chosen choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const auto allowed = [&](const char* name) { return !limit || !std::strcmp(limit, name); };
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && allowed("avx512"))
    return {&avx512::kernels, __builtin_cpu_supports("avx512bf16") ? &with_bf16() : &avx512::kernels};
  if (has_avx2 && (allowed("avx2") || allowed("avx512"))) return {&avx2::kernels, &avx2::kernels};
#endif
  return {&baseline::kernels, &baseline::kernels};
}

}  // namespace

const Kernels& kernels(Dtype dtype) {
  static const Chosen chosen = choose();
  return dtype == Dtype::bf16 ? *chosen.bf16 : *chosen.any;
}

}  // namespace rkl::cpu
