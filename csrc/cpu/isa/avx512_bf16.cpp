// The kernels for bf16 on AVX-512 that can round to bf16 in one instruction, where it takes eight otherwise.
#if defined(__x86_64__)
#include "cpu/isa/common.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#endif

#define RKL_ISA avx512_bf16
#define RKL_LANES 16
#define RKL_BF16_ONLY
#include "cpu/isa/all_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
