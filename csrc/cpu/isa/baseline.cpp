// The kernels for what every processor of the architecture has (SSE2, NEON), 4 floats a vector.
#include "cpu/isa/common.h"

#define RKL_ISA baseline
#define RKL_LANES 4
#include "cpu/isa/all_kernels.h"
