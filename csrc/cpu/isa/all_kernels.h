// Every kernel, for the instruction set that RKL_ISA names.
#pragma once
#include "cpu/depthwise/depthwise.h"
#include "cpu/separable/pointwise_share.h"
#include "cpu/simd/elementwise.h"
#include "cpu/simd/transpose.h"

namespace rkl::cpu::RKL_ISA {

template <class T>
constexpr Kernels kernels_of() {
  return {Pixels<T>::kTogether * kLanes,
          trelu<T>,
          trelu_backward<T>,
          pack_filter<T>,
          depthwise_packed<T>,
          depthwise_backward<T>,
          pack_pointwise<T>,
          pointwise_rows<T>,
          add_pointwise_share<T>,
          epilogue<T>,
          activation_backward<T>,
          widen<T>,
          add_column_sums<T>,
          planes_to_rows<T>,
          rows_to_planes<T>,
          sum_shares<T>};
}

extern const KernelTable kernels;
#ifdef RKL_BF16_ONLY
const KernelTable kernels{{}, kernels_of<bf16>(), {}};
#else
const KernelTable kernels{kernels_of<float>(), kernels_of<bf16>(), kernels_of<f16>()};
#endif

}  // namespace rkl::cpu::RKL_ISA
