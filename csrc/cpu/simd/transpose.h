// Matrices transposed in registers, kLanes by kLanes elements at a time.
#pragma once
#include "cpu/simd/vec.h"

namespace rkl::cpu::RKL_ISA {

// Alternate lanes of two vectors, from their lower and their upper halves.
#if RKL_LANES == 16
#define RKL_LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define RKL_UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif RKL_LANES == 8
#define RKL_LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define RKL_UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define RKL_LOWER 0, 4, 1, 5
#define RKL_UPPER 2, 6, 3, 7
#endif
#if defined(__clang__)
inline Vec zip_lower(Vec a, Vec b) { return __builtin_shufflevector(a, b, RKL_LOWER); }
inline Vec zip_upper(Vec a, Vec b) { return __builtin_shufflevector(a, b, RKL_UPPER); }
#else
inline Vec zip_lower(Vec a, Vec b) { return __builtin_shuffle(a, b, VecInt{RKL_LOWER}); }
inline Vec zip_upper(Vec a, Vec b) { return __builtin_shuffle(a, b, VecInt{RKL_UPPER}); }
#endif

// kLanes vectors as the rows of a matrix, transposed: each round moves one bit of a lane's number into the row's.
inline void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = zip_lower(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = zip_upper(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// out (columns, rows) = in (rows, columns), both dense.
inline void transpose_matrix(const float* in, float* out, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t height = std::min<int64_t>(kLanes, rows - r), width = std::min<int64_t>(kLanes, columns - c);
      Vec tile[kLanes] = {};
      for (int64_t i = 0; i < height; ++i) {
        const float* from = in + (r + i) * columns + c;
        tile[i] = width == kLanes ? load(from) : load_some(from, width);
      }
      transpose(tile);
      for (int64_t i = 0; i < width; ++i) {
        float* to = out + (c + i) * rows + r;
        height == kLanes ? store(to, tile[i]) : store_some(to, tile[i], height);
      }
    }
}

// Each vector's lanes added up, in a fixed order: `add(i, sum)` for each of `count` vectors that lie one behind the
// other. Many at once, since the lanes of one would be as many additions that wait for each other.
template <class Add>
inline void sum_lanes(const float* vectors, int64_t count, Add&& add) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, count - first);
    Vec v[kLanes] = {};
    for (int64_t i = 0; i < here; ++i) v[i] = load(vectors + (first + i) * kLanes);
    transpose(v);
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) v[i] += v[i + width];
    for (int64_t i = 0; i < here; ++i) add(first + i, v[0][i]);
  }
}

}  // namespace rkl::cpu::RKL_ISA
