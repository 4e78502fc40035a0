// The row pipeline's launches, by what they make.
#include "cuda/rows_launch.cuh"

namespace rkl::cuda {

void launch_rows(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  if (result == Result::output) return launch_rows_convolution(a, false, plan, dtype, stream);
  if (a.g.stride_h == 2) return launch_rows_stride2_data_grad(a, plan, dtype, stream);
  Convolution gradient = a;
  gradient.g = data_grad_as_convolution(a.g);
  launch_rows_convolution(gradient, true, plan, dtype, stream);
}

void launch_rows(Result result, const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  result == Result::both_grads ? launch_rows_both_grads(a, plan, dtype, stream)
                               : launch_rows_filter_grad(a, plan, dtype, stream);
}

}  // namespace rkl::cuda
