// What the tensor cores have made, on its way out.
#pragma once
#include "cuda/element.cuh"
#include "cuda/ptx.cuh"

namespace rkl::cuda {

// The sums of two products of 16 by 8 as elements in shared memory, four 8 x 8 matrices: the lane's row of them begins
// at `address`, as stmatrix_x4 has it.
template <class T>
__device__ inline void put_row(uint32_t address, const float (&sums)[2][4]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack2<T>(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
  stmatrix_x4(address, words);
}

}  // namespace rkl::cuda
