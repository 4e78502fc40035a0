// Vectors of floats in the compiler's own vector types, as wide as the instruction set that this header is compiled
// for. Each of cpu/isa/avx512.cpp, avx512_bf16.cpp, avx2.cpp and baseline.cpp sets RKL_ISA and RKL_LANES and includes
// the kernels once. So the kernels have one source, and a namespace rkl::cpu::RKL_ISA for each instruction set.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/machine.h"

namespace rkl::cpu::RKL_ISA {

// Types that are stored in 16 bits and computed with in fp32.
using bf16 = c10::BFloat16;
using f16 = c10::Half;

constexpr int kLanes = RKL_LANES;
typedef float Vec __attribute__((vector_size(4 * RKL_LANES)));
typedef int32_t VecInt __attribute__((vector_size(4 * RKL_LANES)));
typedef uint32_t VecBits __attribute__((vector_size(4 * RKL_LANES)));
typedef uint16_t VecHalf __attribute__((vector_size(2 * RKL_LANES)));

// x - 0, which the compiler knows to be x; x + 0 is not, for x = -0.
inline Vec broadcast(float x) { return x - Vec{}; }

// memcpy reads or writes a vector at an address of any alignment. It compiles to one instruction.
template <class V>
inline V read(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void write(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Unrolls the loop behind it, of at most 32 rounds: an array of vectors lies in registers only where its indices are
// constants.
#define RKL_UNROLL _Pragma("GCC unroll 32")

// The same value, held in a register from here on. GCC would load it again for every multiply-add that uses it.
inline Vec in_register(Vec v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// ---- 16-bit integers to 32 bits and back, by intrinsics where there are any: GCC 12 makes five instructions of
// __builtin_convertvector for a whole vector.

inline VecBits wide_bits(VecHalf v) {
#if RKL_LANES == 16
  return (VecBits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif RKL_LANES == 8
  return (VecBits)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, VecBits);
#endif
}

inline VecHalf narrow_bits(VecBits v) {
#if RKL_LANES == 16
  return (VecHalf)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#elif RKL_LANES == 8
  return (VecHalf)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  return __builtin_convertvector(v, VecHalf);
#endif
}

// ---- kLanes elements at p, as floats

inline Vec load(const float* p) { return read<Vec>(p); }

inline Vec load(const bf16* p) { return (Vec)(wide_bits(read<VecHalf>(p)) << 16); }

inline Vec load(const f16* p) {
#if RKL_LANES == 16
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(p));
#elif RKL_LANES == 8
  return (Vec)_mm256_cvtph_ps(read<__m128i>(p));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = float(p[i]);
  return v;
#endif
}

// ---- factors: kLanes elements at p in the form in which multiply_add takes them

inline Vec factor(const float* p) { return load(p); }
inline Vec factor(const f16* p) { return load(p); }

#ifdef RKL_BF16_ONLY
// A factor is a pair of bf16 whose second is 0. _mm512_dpbf16_ps multiplies such pairs and adds them in fp32, so that
// no shift has to widen them. It treats denormal numbers as zero.
inline Vec factor(const bf16* p) { return (Vec)wide_bits(read<VecHalf>(p)); }
inline Vec widened(Vec factor, bf16) { return (Vec)((VecBits)factor << 16); }
inline Vec as_factor(Vec v, bf16) { return (Vec)((VecBits)v >> 16); }
inline Vec multiply_add(Vec sum, Vec a, Vec b, bf16) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
inline Vec factor(const bf16* p) { return load(p); }
#endif

// For type T. widened: a factor as floats; as_factor: floats that T can hold as a factor; multiply_add: sum + a * b.
template <class T>
inline Vec widened(Vec factor, T) {
  return factor;
}
template <class T>
inline Vec as_factor(Vec v, T) {
  return v;
}
template <class T>
inline Vec multiply_add(Vec sum, Vec a, Vec b, T) {
  return sum + a * b;
}

// ---- floats rounded to the element type (to nearest, ties to even), as they lie in memory

inline Vec packed(Vec v, float) { return v; }

// The bits of v, whose upper halves are the bf16 numbers that v rounds to.
inline VecBits rounded_bits(Vec v) {
  const VecBits bits = (VecBits)v;
  const VecBits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const VecBits number = (VecBits)(v == v);  // NaN must not round up into infinity
  return (rounded & number) | (0x7fc00000 & ~number);
}

inline VecHalf packed(Vec v, bf16) {
#ifdef RKL_BF16_ONLY
  return (VecHalf)_mm512_cvtneps_pbh((__m512)v);  // denormal numbers become zero
#else
  return narrow_bits(rounded_bits(v) >> 16);
#endif
}

inline VecHalf packed(Vec v, f16) {
#if RKL_LANES == 16
  return (VecHalf)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif RKL_LANES == 8
  return (VecHalf)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  VecHalf half;
  for (int i = 0; i < kLanes; ++i) half[i] = f16(v[i]).x;
  return half;
#endif
}

template <class T>
inline void store(T* p, Vec v) {
  write(p, packed(v, T{}));
}

// ---- streaming stores: they write whole cache lines past the caches, and need not read them first

// How many vectors of elements of type T fill a cache line.
template <class T>
constexpr int kLineVectors = int(kLine) / (kLanes * int(sizeof(T)));

// Must be called before another thread reads what streaming stores wrote.
inline void end_stream() {
#if RKL_LANES >= 8
  _mm_sfence();
#endif
}

template <class T, int V>
inline void stream(T* p, const Vec (&v)[V]) {
  static_assert(V % kLineVectors<T> == 0);
  RKL_UNROLL for (int i = 0; i < V; ++i) {
#if RKL_LANES == 16
    if constexpr (sizeof(T) == 4) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p + i * kLanes), (__m512i)v[i]);
    } else if (i % 2 == 0) {
      const __m512i lower = _mm512_castsi256_si512((__m256i)packed(v[i], T{}));
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p + i * kLanes),
                          _mm512_inserti64x4(lower, (__m256i)packed(v[i + 1], T{}), 1));
    }
#else
#if RKL_LANES == 8
    if constexpr (sizeof(T) == 4)
      _mm256_stream_ps(p + i * kLanes, (__m256)v[i]);
    else
#endif
      store(p + i * kLanes, v[i]);
#endif
  }
}

// ---- fewer than kLanes elements, where a row ends

template <class T>
inline Vec load_some(const T* p, int64_t count) {
  T whole[kLanes] = {};
#if RKL_LANES == 16
  const __mmask16 lanes = __mmask16((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return (Vec)_mm512_maskz_loadu_ps(lanes, p);
  write(whole, _mm256_maskz_loadu_epi16(lanes, p));
#else
  for (int64_t i = 0; i < count; ++i) whole[i] = p[i];
#endif
  return load(whole);
}

template <class T>
inline void store_some(T* p, Vec v, int64_t count) {
#if RKL_LANES == 16
  const __mmask16 lanes = __mmask16((1u << count) - 1);
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, lanes, v);
  else
    _mm256_mask_storeu_epi16(p, lanes, (__m256i)packed(v, T{}));
#else
  T whole[kLanes];
  store(whole, v);
  for (int64_t i = 0; i < count; ++i) p[i] = whole[i];
#endif
}

#if RKL_LANES == 16
// The factors at p in the lanes that the mask sets, zeros in the others, whose memory is not touched.
inline Vec factor_masked(const float* p, uint16_t mask) { return (Vec)_mm512_maskz_loadu_ps(mask, p); }
template <class T>
inline Vec factor_masked(const T* p, uint16_t mask) {
  const VecHalf some = (VecHalf)_mm256_maskz_loadu_epi16(mask, p);
  return factor(reinterpret_cast<const T*>(&some));
}
#endif

// `count` elements, at most kLanes: fewer where a row ends.
template <class T>
inline Vec load_up_to(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_some(p, count);
}
template <class T>
inline void store_up_to(T* p, Vec v, int64_t count) {
  count >= kLanes ? store(p, v) : store_some(p, v, count);
}

// Calls f(i, count) for each vector of a row of n elements: whole vectors, then what is left.
template <class F>
inline void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, n - i);
}

// Lane by lane: a where the condition's lanes are set, else b.
inline Vec select(VecInt condition, Vec a, Vec b) { return condition ? a : b; }

}  // namespace rkl::cpu::RKL_ISA
