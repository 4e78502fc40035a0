// Every kernel, for the instruction set that RKL_ISA names.
#pragma once
#include "cpu/depthwise/depthwise.h"
#include "cpu/separable/pointwise_share.h"
#include "cpu/simd/elementwise.h"
#include "cpu/simd/transpose.h"

namespace rkl::cpu::RKL_ISA {

extern const Kernels kernels;
const Kernels kernels = {trelu,
                         trelu_backward,
                         depthwise,
                         pack_filter,
                         depthwise_packed,
                         depthwise_backward,
                         pack_pointwise,
                         pointwise_rows,
                         add_pointwise_share,
                         epilogue,
                         activation_backward,
                         widen,
                         finish,
                         add_column_sums,
                         transpose_in,
                         transpose_out,
                         round,
                         sum_shares};

}  // namespace rkl::cpu::RKL_ISA
