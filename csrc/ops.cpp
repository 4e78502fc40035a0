// The operators on the CPU: guards, outputs and layouts here, arithmetic in cpu/. Schemas: rkl_kernels/ops.py.
#include "cpu/kernels.h"
#include "module.h"
#include "trelu_op.h"

namespace rkl {
namespace {

struct CpuTRelu {
  static void forward(const void* x, void* y, int64_t n, Dtype dtype, const Tensor&) { cpu::trelu(x, y, n, dtype); }
  static void backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype, const Tensor&) {
    cpu::trelu_backward(grad, y, dx, n, dtype);
  }
};

}  // namespace
}  // namespace rkl

STABLE_TORCH_LIBRARY_IMPL(rkl, CPU, m) {
  using Cpu = rkl::TReluOps<rkl::CpuTRelu>;
  m.impl("trelu", TORCH_BOX(&Cpu::forward));
  m.impl("trelu_", TORCH_BOX(&Cpu::forward_));
  m.impl("trelu_backward", TORCH_BOX(&Cpu::backward));
}

RKL_PYTHON_MODULE(_C)
