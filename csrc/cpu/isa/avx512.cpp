// The kernels for AVX-512, 16 floats a vector.
#if defined(__x86_64__)
#include "cpu/isa/common.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define RKL_ISA avx512
#define RKL_LANES 16
#include "cpu/isa/all_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
