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

// A lane holds an element of 32 bits, or two of 16 from two rows.
template <class Word>
constexpr int kRowsOfLane = 4 / int(sizeof(Word));

// Up to kLanes columns of as many rows as a lane has.
inline Vec load_lanes(const uint32_t* in, int64_t, int64_t, int64_t columns) {
  const float* from = reinterpret_cast<const float*>(in);
  return columns == kLanes ? load(from) : load_some(from, columns);
}
inline Vec load_lanes(const uint16_t* in, int64_t in_row, int64_t rows, int64_t columns) {
  uint16_t some[2][kLanes] = {};
  if (columns < kLanes || rows < 2) {
    for (int64_t r = 0; r < std::min<int64_t>(rows, 2); ++r) std::copy_n(in + r * in_row, columns, some[r]);
    in = some[0], in_row = kLanes;
  }
  return (Vec)(wide_bits(read<VecHalf>(in)) | wide_bits(read<VecHalf>(in + in_row)) << 16);
}

// A tile of `rows` by `columns` elements, at most kLanes lanes by kLanes.
template <class Word>
void transpose_tile(const Word* in, int64_t in_row, Word* out, int64_t out_row, int64_t rows, int64_t columns) {
  constexpr int kRows = kRowsOfLane<Word>;
  Vec tile[kLanes];
  if (rows == kRows * kLanes && columns == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) tile[i] = load_lanes(in + i * kRows * in_row, in_row, kRows, kLanes);
    transpose(tile);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) write(out + i * out_row, tile[i]);
    return;
  }
  for (int64_t i = 0; i < kLanes; ++i)
    tile[i] = i * kRows < rows ? load_lanes(in + i * kRows * in_row, in_row, rows - i * kRows, columns) : Vec{};
  transpose(tile);
  for (int64_t i = 0; i < columns; ++i) __builtin_memcpy(out + i * out_row, &tile[i], rows * sizeof(Word));
}

// Row by row of tiles, the last of which are moved back over their neighbours where there are any. Rows are asked for
// ahead of time: there are more of them than the hardware follows (144 planes of 56 x 56: 15 GB/s, asked for 27).
template <class Word>
void transpose_words(const Word* in, int64_t in_row, Word* out, int64_t out_row, int64_t rows, int64_t columns) {
  constexpr int64_t kHeight = kRowsOfLane<Word> * kLanes, kAhead = 4 * kLanes;
  const int64_t height = std::min(rows, kHeight), width = std::min<int64_t>(columns, kLanes);
  for (int64_t next = 0; next < rows; next += kHeight)
    for (int64_t next_column = 0; next_column < columns; next_column += kLanes) {
      const int64_t r = std::min(next, rows - height), c = std::min(next_column, columns - width);
      // Where these rows end, the next ones follow.
      const Word* ahead = in + r * in_row + c + (c + kAhead < columns ? kAhead : kAhead - columns + height * in_row);
      for (int64_t i = 0; i < height; ++i) __builtin_prefetch(ahead + i * in_row);
      transpose_tile(in + r * in_row + c, in_row, out + c * out_row + r, out_row, height, width);
    }
}

// out (columns, rows) = in (rows, columns); in_row, out_row: elements from one row's to the next's.
inline void transpose_matrix(const void* in, int64_t in_row, void* out, int64_t out_row, int64_t rows, int64_t columns,
                             Dtype dtype) {
  if (dtype == Dtype::f32)
    transpose_words(static_cast<const uint32_t*>(in), in_row, static_cast<uint32_t*>(out), out_row, rows, columns);
  else
    transpose_words(static_cast<const uint16_t*>(in), in_row, static_cast<uint16_t*>(out), out_row, rows, columns);
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
