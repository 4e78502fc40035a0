// The kernels for AVX-512, 16 floats a vector.
#if defined(__x86_64__)
#include "cpu/isa/common.h"

#define RKL_ISA avx512
#define RKL_LANES 16
RKL_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "cpu/isa/all_kernels.h"
RKL_END_TARGET
#endif
