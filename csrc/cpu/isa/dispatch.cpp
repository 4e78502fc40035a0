// Which instruction set's kernels serve this process, and which shapes are left to PyTorch.
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
// The bf16 instructions flush denormal numbers to zero. A sum may, but T-ReLU must not change a positive number.
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

// PyTorch gets NHWC images with fewer channels than a vector has lanes, which go through a scratch image here (12
// channels, 3 x 3: 0.56 to 0.78 of oneDNN's rate). It does not get several images of at most 8 channels, which share
// vectors (8 channels: 0.81 to 1.18, by way of oneDNN 0.69 to 0.87; 3 channels: 0.79 to 1.3), nor images whose pixels
// count as channels, nor fewer than 32768 pixels: the way to oneDNN, 25 to 60 us, takes longer than it saves. All
// measured with AVX-512.
// In 16 bits it gets no filter of more than kMostColumns16 columns: from 15 on oneDNN's call in bf16 does not come back
// (torch 2.13, Zen 5, stride and dilation 1).
bool left_to_pytorch(const Conv2d& g, Dtype dtype) {
  constexpr int kMostColumns16 = 14;
  const int64_t together = kernels(dtype).together;
  if (dtype != Dtype::f32 && g.kernel_w > kMostColumns16) return false;
  if (together != (dtype == Dtype::f32 ? 16 : 32)) return false;
  if (!g.nhwc || g.batch * g.out_h * g.out_w < 32768) return false;
  return g.channels * pixels_as_channels(g, together) < 16 && (g.channels > 8 || g.batch == 1);
}

}  // namespace rkl::cpu
