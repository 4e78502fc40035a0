// What the launches of the register kernels share.
#pragma once
#include <type_traits>

#include "cuda/depthwise.h"
#include "cuda/element.cuh"
#include "cuda/registers_plan.h"

namespace rkl::cuda::registers {

// What registers.cu calls in the kernels' files. flipped: the filter is read from its end to its beginning.
void launch_convolution(const Convolution& a, bool flipped, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_stride2_data_grad(const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_filter_grad(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_both_grads(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream);

// Calls f with a value of the element type and, as constants, the filter's compiled size and the stride. In 16 bits the
// larger filters serve only what `rows` declines at stride 1: channels not a multiple of 8, dilations too wide.
template <class F>
void by_kernel(int kernel, int64_t stride, Dtype dtype, F&& f) {
  by_type(dtype, [&](auto zero) {
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    const auto with = [&](auto size) {
      if (stride == 1) return f(zero, size, one);
      if constexpr (sizeof(zero) == 4 || size == 3) f(zero, size, two);
    };
    if (kernel == 3) return with(std::integral_constant<int, 3>());
    if (kernel == 5) return with(std::integral_constant<int, 5>());
    if (kernel == 7) return with(std::integral_constant<int, 7>());
  });
}

}  // namespace rkl::cuda::registers
