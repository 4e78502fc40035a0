// Sums of a matrix's columns, and of tasks' shares: serial, over what is in cache.
#pragma once
#include "cpu/simd/vec.h"

namespace rkl::cpu::RKL_ISA {

// Runs of kRun values are added up in fp32, and the runs' sums in fp64.
constexpr int64_t kRun = 8;
using DoubleVec = double __attribute__((vector_size(kLanes * sizeof(double))));

// Adds the sum of each column to sums.
template <class T>
void add_column_sums(const void* matrix, double* sums, int64_t rows, int64_t columns) {
  const T* in = static_cast<const T*>(matrix);
  for_vectors(columns, [&](int64_t c, int64_t count) {
    DoubleVec sum{};
    for (int64_t first = 0; first < rows; first += kRun) {
      Vec run{};
      for (int64_t r = first; r < std::min(first + kRun, rows); ++r) run += load_up_to(in + r * columns + c, count);
      sum += __builtin_convertvector(run, DoubleVec);
    }
    for (int64_t i = 0; i < count; ++i) sums[c + i] += sum[i];
  });
}

template <class T>
void sum_shares(const float* shares, int64_t count, int64_t stride, int64_t block, void* out, int64_t n) {
  constexpr int64_t kBlock = PointwiseFilter::kOutputs;
  for_vectors(n, [&](int64_t i, int64_t some) {
    const float* from = shares + i / kBlock * block + i % kBlock;
    DoubleVec sum{};
    for (int64_t share = 0; share < count; ++share)
      sum += __builtin_convertvector(load_up_to(from + share * stride, some), DoubleVec);
    store_up_to(static_cast<T*>(out) + i, __builtin_convertvector(sum, Vec), some);
  });
}

}  // namespace rkl::cpu::RKL_ISA
