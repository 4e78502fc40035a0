// Every kernel, for the instruction set that RKL_ISA names.
#pragma once
#include "cpu/depthwise/depthwise.h"
#include "cpu/separable/pointwise_share.h"
#include "cpu/simd/elementwise.h"
#include "cpu/simd/transpose.h"

namespace rkl::cpu::RKL_ISA {

template <class T>
constexpr Kernels kernels_of() {
  // A strip of outputs is then four lines of a plane; with AVX2 it is one. (Ice Lake, over transposed outputs: kb-86
  // and mnv1-112 1.05 to 1.2 times the rate in fp32, 0.9 to 1.0 in bf16; with AVX2 0.8 to 1.05 in fp32.)
  constexpr bool streams_planes = sizeof(T) == 4 && RKL_LANES == 16;
  return {Pixels<T>::kTogether * kLanes,
          streams_planes,
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
