// What csrc/ops.cpp calls: the CPU kernels, over dense memory. Each splits its work over torch's thread pool.
#pragma once
#include "geometry.h"

namespace rkl::cpu {

void trelu(const void* x, void* y, int64_t n, Dtype dtype);
void trelu_backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype);

}  // namespace rkl::cpu
