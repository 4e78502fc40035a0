// How channels in memory meet their weights. An operand of fp32 multiply-adds is a vector of channels of one pixel, or
// of two pixels one above the other.
#pragma once
#include "cpu/simd/vec.h"

namespace rkl::cpu::RKL_ISA {

#define RKL_INLINE __attribute__((always_inline)) inline

// Vector registers. AVX-512 and NEON have 32.
#if RKL_LANES == 16 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// An operand is kLanes channels of kRows pixels; its weights are kLanes words. kTogether: neighbouring vectors that are
// loaded and stored together (32 channels of 16 bits are one cache line). kAtOnce: vectors that a window takes where
// there are so many. kLooksAhead: windows prefetch pixels that come from far into the nearest cache as well. A vector
// must be a line then, so that each line is prefetched once.
template <class T>
struct Pixels {
  static constexpr int kRows = 1, kTogether = 1, kAtOnce = kRegisters == 16 ? 2 : 1;
  static constexpr bool kLooksAhead = kLineVectors<T> == 1;
  template <int V>
  static RKL_INLINE void load(const T* const* rows, int64_t at, Vec (&x)[V]) {
    RKL_UNROLL for (int v = 0; v < V; ++v) x[v] = in_register(RKL_ISA::load(rows[0] + at + v * kLanes));
  }
  // streamed: stores past the caches, where the vectors are whole cache lines.
  template <int V>
  static RKL_INLINE void store(T* to, const Vec (&y)[V], bool streamed) {
    if constexpr (V % kLineVectors<T> == 0)
      if (streamed) return stream(to, y);
    RKL_UNROLL for (int v = 0; v < V; ++v) RKL_ISA::store(to + v * kLanes, y[v]);
  }
  static RKL_INLINE void cross(Vec (&)[1]) {}
  static RKL_INLINE void uncross(Vec (&)[1]) {}
  static RKL_INLINE Vec upper_alone(Vec x) { return x; }
  static RKL_INLINE Vec add(Vec sum, Vec x, Vec weight) { return sum + x * weight; }
  static RKL_INLINE Vec weight(Vec first, Vec) { return first; }
};

#ifdef RKL_BF16_ONLY
// _mm512_dpbf16_ps multiplies and adds the bf16 of both pixels at the rate of one fp32 multiply-add (Zen 4), and
// nothing has to be widened: a column takes 2 instructions under a filter of 3 rows, 4 under 7. It treats denormal
// numbers as zero. (One pixel with a zero beside it would gain nothing.)
//
// Two vectors loaded together are crossed: they lie as the unpack instructions leave them, which takes one instruction
// each. Channels 0 to 3, 8 to 11, 16 to 19 and 24 to 27 are in the first, the others in the second; so are their
// weights, bias and sums. The order of memory would take a permutation for each, which destroys its register of indices
// (7 x 7, 14 px: 34 clocks a vector, 31 crossed, 41 a vector alone; 5 x 5: 25, 22 and 27).
template <>
struct Pixels<bf16> {
  static constexpr int kRows = 2, kTogether = 2, kAtOnce = 2;
  static constexpr bool kLooksAhead = false;  // arithmetic hides the latency: with it, windows took 1.03 times as long
  template <int V>
  static RKL_INLINE void load(const bf16* const* rows, int64_t at, Vec (&x)[V]) {
    if constexpr (V == 1) {
      const __m512i places = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
                                              6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
      const __m512i a = _mm512_castsi256_si512(read<__m256i>(rows[0] + at));
      const __m512i b = _mm512_castsi256_si512(read<__m256i>(rows[1] + at));
      x[0] = in_register((Vec)_mm512_permutex2var_epi16(a, places, b));
    } else {
      const __m512i a = read<__m512i>(rows[0] + at), b = read<__m512i>(rows[1] + at);
      x[0] = in_register((Vec)_mm512_unpacklo_epi16(a, b));
      x[1] = in_register((Vec)_mm512_unpackhi_epi16(a, b));
    }
  }
  template <int V>
  static RKL_INLINE void store(bf16* to, const Vec (&y)[V], bool streamed) {
    if constexpr (V == 1) {
      RKL_ISA::store(to, y[0]);
    } else {
      const __m512i crossed = (__m512i)_mm512_cvtne2ps_pbh((__m512)y[1], (__m512)y[0]);
      const __m512i line = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), crossed);
      streamed ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line) : write(to, line);
    }
  }
  // Crosses two vectors that are in the order of memory.
  static RKL_INLINE void cross(Vec (&x)[2]) {
    const __m512 a = (__m512)x[0], b = (__m512)x[1];
    x[0] = (Vec)_mm512_shuffle_f32x4(a, b, 0x88);
    x[1] = (Vec)_mm512_shuffle_f32x4(a, b, 0xdd);
  }
  static RKL_INLINE void uncross(Vec (&x)[2]) {
    const __m512 a = (__m512)x[0], b = (__m512)x[1];
    const __m512 first = _mm512_shuffle_f32x4(a, b, 0x44), second = _mm512_shuffle_f32x4(a, b, 0xee);
    x[0] = (Vec)_mm512_shuffle_f32x4(first, first, 0xd8);
    x[1] = (Vec)_mm512_shuffle_f32x4(second, second, 0xd8);
  }
  // The operand with zeros in the place of the lower pixel.
  static RKL_INLINE Vec upper_alone(Vec x) { return (Vec)_mm512_maskz_mov_epi16(0x55555555, (__m512i)x); }
  static RKL_INLINE Vec add(Vec sum, Vec x, Vec weight) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)weight);
  }
  // Both weights are bf16 numbers as floats: their lower halves are zero.
  static RKL_INLINE Vec weight(Vec first, Vec second) {
    return (Vec)((VecBits)first >> 16 | ((VecBits)second & 0xffff0000u));
  }
};
#endif

}  // namespace rkl::cpu::RKL_ISA
