// The T-ReLU operators over a device's kernels: outputs, layouts and early returns, shared by the CPU and CUDA modules.
#pragma once
#include "tensor_args.h"

namespace rkl {

// Kernels: struct with static forward(x, y, n, dtype, like) and backward(grad, y, dx, n, dtype, like) over dense
// memory.
template <class Kernels>
struct TReluOps {
  static Tensor forward(const Tensor& x) {
    const Dtype dtype = dtype_of(x, "x");
    Tensor y = new_like(x);
    if (!x.numel()) return y;
    const Tensor in = laid_out_like(x, y);
    Kernels::forward(in.const_data_ptr(), y.mutable_data_ptr(), x.numel(), dtype, x);
    return y;
  }

  static void forward_(Tensor x) {
    const Dtype dtype = dtype_of(x, "x");
    if (!x.numel()) return;
    Tensor in = x.dim() == 4 ? dense(x, suggests_nhwc(x)) : as_contiguous(x);
    Kernels::forward(in.const_data_ptr(), in.mutable_data_ptr(), x.numel(), dtype, x);
    if (in.data_ptr() != x.data_ptr()) torch::stable::copy_(x, in);  // x had gaps: it went through a dense copy
  }

  static Tensor backward(const Tensor& grad, const Tensor& y) {
    const Dtype dtype = dtype_of(y, "y");
    check_same(grad, y, "grad and y");
    STD_TORCH_CHECK(grad.dim() == y.dim(), "grad must have the shape of y");
    for (int64_t d = 0; d < y.dim(); ++d) STD_TORCH_CHECK(grad.size(d) == y.size(d), "grad must have the shape of y");
    Tensor dx = new_like(y);
    if (!y.numel()) return dx;
    const Tensor grad_in = laid_out_like(grad, dx), y_in = laid_out_like(y, dx);
    Kernels::backward(grad_in.const_data_ptr(), y_in.const_data_ptr(), dx.mutable_data_ptr(), y.numel(), dtype, y);
    return dx;
  }
};

}  // namespace rkl
