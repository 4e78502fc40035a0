// The kernels for AVX2, 8 floats a vector.
#if defined(__x86_64__)
#include "cpu/isa/common.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define RKL_ISA avx2
#define RKL_LANES 8
#include "cpu/isa/all_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
