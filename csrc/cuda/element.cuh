// Elements in memory and as float, and vectors of 16 bytes: the widest load a thread can make.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "geometry.h"

namespace rkl::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bf16 v) { return __bfloat162float(v); }
__device__ inline float to_float(f16 v) { return __half2float(v); }

template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline bf16 from_float<bf16>(float v) {
  return __float2bfloat16(v);
}
template <>
__device__ inline f16 from_float<f16>(float v) {
  return __float2half(v);
}

template <class T, int N = 16 / sizeof(T)>
struct alignas(N * sizeof(T)) Vec {
  static constexpr int size = N;
  T v[N];
};

// Call f with a value of the element type: by_type(dtype, [&](auto zero) { using T = decltype(zero); ... }).
template <class F>
void by_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float{});
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::f16:
      return f(f16{});
  }
}

}  // namespace rkl::cuda
