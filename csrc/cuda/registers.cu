// Which of the register kernels makes which result.
#include "cuda/registers_launch.cuh"

namespace rkl::cuda {

void launch_registers(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  if (result == Result::output) return registers::launch_convolution(a, false, plan, dtype, stream);
  if (a.g.stride_h == 2) return registers::launch_stride2_data_grad(a, plan, dtype, stream);
  Convolution gradient = a;
  gradient.g = data_grad_as_convolution(a.g);
  registers::launch_convolution(gradient, true, plan, dtype, stream);
}

void launch_registers(Result result, const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  result == Result::both_grads ? registers::launch_both_grads(a, plan, dtype, stream)
                               : registers::launch_filter_grad(a, plan, dtype, stream);
}

}  // namespace rkl::cuda
