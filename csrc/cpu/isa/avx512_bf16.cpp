// The bf16 kernels for AVX512_BF16, which rounds to bf16 in one instruction where AVX-512 takes eight.
#if defined(__x86_64__)
#include "cpu/isa/common.h"

#define RKL_ISA avx512_bf16
#define RKL_LANES 16
#define RKL_BF16_ONLY
RKL_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#include "cpu/isa/all_kernels.h"
RKL_END_TARGET
#endif
