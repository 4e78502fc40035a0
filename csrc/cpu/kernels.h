// What csrc/ops.cpp calls: the CPU kernels, over dense memory. Each splits its work over torch's thread pool by the
// tensors' shapes alone, so that results do not depend on the number of threads.
#pragma once
#include "activation.h"
#include "geometry.h"

namespace rkl::cpu {

// The kernels as compiled for one instruction set.
struct Kernels {
  void (*trelu)(const void* x, void* y, int64_t n, Dtype dtype);
  void (*trelu_backward)(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype);

  // y = act(x * weight + bias); bias may be null.
  void (*depthwise)(const Conv2d& g, const void* x, const void* weight, const void* bias, Activation act, void* y,
                    Dtype dtype);
  // The gradients of x, weight and bias; each may be null where it is not wanted.
  void (*depthwise_backward)(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx,
                             void* dweight, void* dbias, Dtype dtype);

  // Over a dense matrix of rows by channels: out = act(z + bias), and grad times the activation's slope told from its
  // output or its input. out may be the first argument.
  void (*epilogue)(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels,
                   Dtype dtype);
  void (*slope)(const void* grad, const void* values, Activation act, bool from_output, void* out, int64_t n,
                Dtype dtype);
};

// The widest instruction set that this machine has, or that ATEN_CPU_CAPABILITY (PyTorch's own variable: default, avx2
// or avx512) allows.
const Kernels& kernels();

void column_sums(const void* matrix, void* out, int64_t rows, int64_t channels, Dtype dtype);

}  // namespace rkl::cpu
