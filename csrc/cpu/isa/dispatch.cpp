// Which instruction set's kernels serve this process, and what is left to PyTorch's.
#include <cstdlib>
#include <cstring>

#include "cpu/depthwise/gather.h"
#include "cpu/kernels.h"
#include "cpu/machine.h"

namespace rkl::cpu {

namespace baseline {
extern const KernelTable kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kernels;
}
namespace avx512 {
extern const KernelTable kernels;
}
namespace avx512_bf16 {
extern const KernelTable kernels;
}
#endif

namespace {

#if defined(__x86_64__)
// The instructions for bf16 make zeros of denormal numbers: fine after a sum, but T-ReLU gives back what is positive.
KernelTable with_bf16() {
  KernelTable merged = avx512::kernels;
  merged.bf16 = avx512_bf16::kernels.bf16;
  merged.bf16.trelu = avx512::kernels.bf16.trelu;
  merged.bf16.trelu_backward = avx512::kernels.bf16.trelu_backward;
  return merged;
}
#endif

KernelTable choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const auto is = [&](const char* name) { return limit && !std::strcmp(limit, name); };
  const bool baseline_alone = is("default"), not_avx512 = baseline_alone || is("avx2");  // else no limit, as in PyTorch
  if (machine().avx512 && !not_avx512) return machine().avx512_bf16 ? with_bf16() : avx512::kernels;
  if (machine().avx2 && !baseline_alone) return avx2::kernels;
#endif
  return baseline::kernels;
}

}  // namespace

const Kernels& kernels(Dtype dtype) {
  static const KernelTable chosen = choose();
  return dtype == Dtype::f32 ? chosen.f32 : dtype == Dtype::bf16 ? chosen.bf16 : chosen.f16;
}

// NHWC images with fewer channels than a vector has lanes, which go through a scratch image: of 12 channels, 3 x 3, at
// 0.56 to 0.78 of oneDNN's rate. Not several images of at most 8, which share vectors (8 channels: 0.81 to 1.18, and
// by way of oneDNN 0.69 to 0.87; 3 channels 0.79 to 1.3), nor where pixels are channels too.
// Of fewer pixels the way to oneDNN, 25 to 60 us, takes longer than is gained. Measured by AVX-512 alone.
bool left_to_pytorch(const Conv2d& g, Dtype dtype) {
  const int64_t together = kernels(dtype).together;
  if (together != (dtype == Dtype::f32 ? 16 : 32)) return false;
  if (!g.nhwc || g.batch * g.out_h * g.out_w < 32768) return false;
  return g.channels * pixels_as_channels(g, together) < 16 && (g.channels > 8 || g.batch == 1);
}

}  // namespace rkl::cpu
