// What the launches of the row pipeline share.
#pragma once
#include <type_traits>

#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "cuda/rows.cuh"

namespace rkl::cuda {

// What rows.cu calls in the kernels' files. flipped: the filter is read from its end to its beginning.
void launch_rows_convolution(const Convolution& a, bool flipped, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_rows_stride2_data_grad(const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_rows_filter_grad(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_rows_both_grads(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream);

namespace rows {

// Calls f with the number of the compiled kernel, as a type, and a value of the element type.
template <int count, class F, int k = 0>
void by_kernel(int kernel, Dtype dtype, const F& f) {
  if constexpr (k < count) {
    if (kernel != k) return by_kernel<count, F, k + 1>(kernel, dtype, f);
    if (dtype == Dtype::bf16) return f(std::integral_constant<int, k>(), bf16());
    return f(std::integral_constant<int, k>(), f16());
  }
}

// Calls f with the flag as a type.
template <class F>
void by_flag(bool flag, const F& f) {
  flag ? f(std::true_type()) : f(std::false_type());
}

// Calls f with the first image and the number of images of each launch.
template <class F>
void by_images(const Conv2d& g, F&& f) {
  const int64_t most = images_at_once(g);
  for (int64_t first = 0; first < g.batch; first += most)
    f(first, int(g.batch - first < most ? g.batch - first : most));
}

template <class T>
T* image(T* tensor, int64_t number, int64_t elements) {
  return tensor ? tensor + number * elements : nullptr;
}

}  // namespace rows
}  // namespace rkl::cuda
