// Elements in memory and as float, and vectors of 16 bytes: the widest load a thread can make.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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

// A word of two 16-bit elements as float, the low half first; bf16 needs a shift or a mask each.
template <class T>
__device__ inline void unpack2(uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t first = word << 16, second = word & 0xffff0000u;
    memcpy(&low, &first, 4);
    memcpy(&high, &second, 4);
  } else {
    __half2 pair;
    memcpy(&pair, &word, 4);
    const float2 both = __half22float2(pair);
    low = both.x;
    high = both.y;
  }
}

// 16 bytes in registers as floats, and back. The compiler would move a struct of 16-bit elements in narrow pieces.
template <class T>
__device__ inline void unpack(uint4 from, float (&to)[16 / sizeof(T)]) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>)
      memcpy(&to[i], &words[i], 4);
    else
      unpack2<T>(words[i], to[2 * i], to[2 * i + 1]);
  }
}

// Two values rounded to 16 bits, the first in the low half: one instruction.
template <class T>
__device__ inline uint32_t pack2(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}

template <class T>
__device__ inline uint4 pack(const float (&from)[16 / sizeof(T)]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>)
      memcpy(&words[i], &from[i], 4);
    else
      words[i] = pack2<T>(from[2 * i], from[2 * i + 1]);
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class F>
void by_type(Dtype dtype, F&& f) {
  rkl::by_type<bf16, f16>(dtype, std::forward<F>(f));
}

}  // namespace rkl::cuda
