// The second stage of a sum over many pixels. The first stage leaves a sum for each part; this one adds them, always in
// the same order and without atomics, so that every run has the same result.
#pragma once
#include "cuda/device.h"
#include "cuda/element.cuh"

namespace rkl::cuda {

// 16 threads a result: a single one would wait for each of up to a thousand parts (25 to 67 us, against 3.5 to 5 us).
constexpr int kSumResults = 32, kSumThreads = 16;

// partial: (parts, results). destination(i): where result i goes, or null where it is not wanted.
template <class T, class Destination>
__global__ void __launch_bounds__(kSumResults* kSumThreads)
    add_parts(const float* partial, int parts, int64_t results, Destination destination) {
  __shared__ float sums[kSumThreads][kSumResults + 1];  // an odd row: the last loop's column lies in all banks
  const int column = threadIdx.x % kSumResults, thread = threadIdx.x / kSumResults;
  const int64_t i = int64_t(blockIdx.x) * kSumResults + column;
  T* to = i < results ? destination(i) : nullptr;
  float sum = 0.f;
  if (to) {
#pragma unroll 8
    for (int part = thread; part < parts; part += kSumThreads) sum += partial[part * results + i];
  }
  sums[thread][column] = sum;
  __syncthreads();
  if (thread || !to) return;
  for (int t = 1; t < kSumThreads; ++t) sum += sums[t][column];
  *to = from_float<T>(sum);
}

template <class T, class Destination>
void launch_add_parts(const float* partial, int parts, int64_t results, Destination destination, cudaStream_t stream) {
  add_parts<T, Destination>
      <<<grid("add_parts", ceil_div(results, kSumResults)), dim3(kSumResults * kSumThreads), 0, stream>>>(
          partial, parts, results, destination);
}

}  // namespace rkl::cuda
