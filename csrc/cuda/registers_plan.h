// Which register kernel serves a convolution, how it is launched, and how it is cut.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cuda/depthwise.h"
#include "cuda/element.cuh"
#include "cuda/registers.h"

namespace rkl::cuda::registers {

// Blocks of kThreads that a multiprocessor has at once: it bounds the registers of a thread, so that none is spilled.
// size: bytes of an element.
constexpr int blocks_of(int kernel, int stride, int size) {
  if (kernel == 3) return (size == 4 ? 5 : 4) - (stride == 2);
  if (kernel == 5) return size == 4 ? 4 : 3;
  return size == 4 ? 3 : 2;
}
constexpr int data_grad_blocks_of(int kernel) { return kernel == 3 ? 5 : kernel == 5 ? 4 : 2; }  // at stride 2
constexpr int filter_grad_blocks_of(int kernel, int stride, int size) {
  if (kernel == 3) return size == 4 && stride == 1 ? 4 : 3;
  if (size == 2) return 2;
  if (kernel == 5) return stride == 1 ? 4 : 3;
  return stride == 1 ? 3 : 2;
}
constexpr int kBothBlocks = 3;

inline unsigned blocks(const Sizes& s, int threads) {
  return unsigned(s.channel_blocks * ceil_div(s.tasks(), threads / s.vectors));
}

// Calls f with a value of the element type and, as constants, the filter's compiled size and the stride. In 16 bits the
// larger filters are for narrow maps, which are of stride 1.
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

// Channels of a thread: 8 bytes; fewer where the sums would not fit into its registers.
constexpr int channels_of(int kernel, int size) { return size == 2 && kernel == 3 ? 4 : 2; }
constexpr int filter_grad_channels_of(int kernel, int stride, int size) {
  if (size == 4) return kernel > 3 ? 1 : 2;
  return kernel == 3 && stride == 1 ? 4 : 2;
}
constexpr int kBothChannels = 2;
constexpr int kPairsAcross = 2;  // pairs of columns of a thread, of the data gradient at stride 2

// flipped: with the filter from its end to its beginning.
void launch_convolution(const Convolution& a, bool flipped, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_stride2_data_grad(const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_filter_grad(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream);
void launch_both_grads(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream);

}  // namespace rkl::cuda::registers
