// How the tensor cores' sums are written to shared memory.
#pragma once
#include "cuda/element.cuh"
#include "cuda/ptx.cuh"

namespace rkl::cuda {

// Rounds the sums of two products of 16 by 8 to T and writes them as four 8 x 8 matrices. `address` is where the row
// that this lane addresses begins, as stmatrix_x4 expects.
template <class T>
__device__ inline void put_row(uint32_t address, const float (&sums)[2][4]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack2<T>(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
  stmatrix_x4(address, words);
}

}  // namespace rkl::cuda
