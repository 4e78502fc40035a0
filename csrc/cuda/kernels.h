// What csrc/cuda/ops_cuda.cpp calls: launches over dense device memory. No torch in here or in the .cu files, so that
// the tests' emulator compiles them alone.
#pragma once
#include <cuda_runtime.h>

#include "geometry.h"

namespace rkl::cuda {

void trelu(const void* x, void* y, int64_t n, Dtype dtype, cudaStream_t stream);
void trelu_backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype, cudaStream_t stream);

}  // namespace rkl::cuda
