// The kernels for AVX2, 8 floats a vector.
#if defined(__x86_64__)
#include "cpu/isa/common.h"

#define RKL_ISA avx2
#define RKL_LANES 8
RKL_BEGIN_TARGET("avx2,fma,f16c")
#include "cpu/isa/all_kernels.h"
RKL_END_TARGET
#endif
