// Matrices transposed in registers, kLanes by kLanes elements at a time.
#pragma once
#include "cpu/simd/vec.h"

namespace rkl::cpu::RKL_ISA {

// Alternate lanes of two vectors, from their lower halves (0) or their upper ones (1).
template <int half, int... I>
inline Vec zip(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((half * kLanes + I) / 2 + I % 2 * kLanes)...);
#else
  return __builtin_shuffle(a, b, VecInt{((half * kLanes + I) / 2 + I % 2 * kLanes)...});
#endif
}

// Transposes the matrix whose rows these are: each round moves one bit of a lane's number into the row's number.
inline void transpose(Vec (&rows)[kLanes]) {
  constexpr std::make_integer_sequence<int, kLanes> lanes;
  RKL_UNROLL for (int round = 1; round < kLanes; round *= 2) {
    Vec next[kLanes];
    RKL_UNROLL for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = zip<0>(rows[i], rows[i + kLanes / 2], lanes);
      next[2 * i + 1] = zip<1>(rows[i], rows[i + kLanes / 2], lanes);
    }
    RKL_UNROLL for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// A lane of 32 bits holds one element of 32 bits, or two of 16 bits from two rows.
template <class Word>
constexpr int kRowsOfLane = 4 / int(sizeof(Word));

// Loads up to kLanes columns of kRowsOfLane rows.
inline Vec load_lanes(const uint32_t* in, int64_t, int64_t, int64_t columns) {
  return load_up_to(reinterpret_cast<const float*>(in), columns);
}
inline Vec load_lanes(const uint16_t* in, int64_t in_row, int64_t rows, int64_t columns) {
  uint16_t some[2][kLanes] = {};
  if (columns < kLanes || rows < 2) {
    for (int64_t r = 0; r < std::min<int64_t>(rows, 2); ++r) std::copy_n(in + r * in_row, columns, some[r]);
    in = some[0], in_row = kLanes;
  }
  return (Vec)(wide_bits(read<VecHalf>(in)) | wide_bits(read<VecHalf>(in + in_row)) << 16);
}

// Stores the first `count` words of a vector.
template <class Word>
void store_lanes(Word* out, Vec v, int64_t count) {
#if RKL_LANES == 16
  if constexpr (sizeof(Word) == 2)
    _mm512_mask_storeu_epi16(out, __mmask32((uint64_t(1) << count) - 1), (__m512i)v);
  else
    _mm512_mask_storeu_epi32(out, __mmask16((1u << count) - 1), (__m512i)v);
#else
  __builtin_memcpy(out, &v, count * sizeof(Word));
#endif
}

// Transposes a tile of `rows` by `columns` elements, at most kRowsOfLane * kLanes by kLanes.
template <class Word>
void transpose_tile(const Word* in, int64_t in_row, Word* out, int64_t out_row, int64_t rows, int64_t columns) {
  constexpr int kRows = kRowsOfLane<Word>;
  Vec tile[kLanes];
  if (rows == kRows * kLanes && columns == kLanes) {
    RKL_UNROLL for (int i = 0; i < kLanes; ++i) tile[i] = load_lanes(in + i * kRows * in_row, in_row, kRows, kLanes);
    transpose(tile);
    RKL_UNROLL for (int i = 0; i < kLanes; ++i) write(out + i * out_row, tile[i]);
    return;
  }
  RKL_UNROLL for (int i = 0; i < kLanes; ++i)
    tile[i] = i * kRows < rows ? load_lanes(in + i * kRows * in_row, in_row, rows - i * kRows, columns) : Vec{};
  transpose(tile);
  RKL_UNROLL for (int i = 0; i < kLanes; ++i) {
    if (i == columns) break;
    store_lanes(out + i * out_row, tile[i], rows);
  }
}

// Prefetches some columns of rows, in the order of memory.
template <class Word>
void ask_for(const Word* first, int64_t row, int64_t rows, int64_t columns) {
  constexpr int64_t kWords = kLine / int64_t(sizeof(Word));
  if (row == columns) columns *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += kWords) __builtin_prefetch(first + r * row + c, 0, 2);
}

// Transposes planes of pixels (channels, pixels) into rows of channels (pixels, channels), or back. plane, row:
// elements from the start of one plane or row to the next. A last tile that is not full moves back over its neighbour.
// Planes are prefetched before tiles cross them, kAhead pixels at a time: the tiles' own accesses are too short runs for
// the hardware prefetcher (ns an element, from and into 512 planes of 14 x 14, fp32: 0.45 and 0.48, prefetched 0.23 and
// 0.19; a copy takes 0.17 and 0.13). More than that at once takes longer (Ice Lake: 0.33 and 0.39, all pixels at once
// 0.49 and 0.56).
template <bool to_rows, class Planes, class Rows>
void transpose_planes(Planes* planes, int64_t plane, Rows* rows, int64_t row, int64_t channels, int64_t pixels) {
  constexpr int64_t kHeight = kRowsOfLane<Rows> * kLanes;
  constexpr int64_t kChannels = to_rows ? kHeight : kLanes, kPixels = to_rows ? kLanes : kHeight;
  constexpr int64_t kAhead = 64;
  const int64_t most_channels = std::min(channels, kChannels), most_pixels = std::min(pixels, kPixels);
  ask_for(planes, plane, most_channels, pixels);
  for (int64_t next = 0; next < channels; next += kChannels) {
    const int64_t c = std::min(next, channels - most_channels), then = next + kChannels;
    for (int64_t pixel = 0; pixel < pixels; pixel += kPixels) {
      if (then < channels && pixel % kAhead == 0)
        ask_for(planes + then * plane + pixel, plane, std::min(kChannels, channels - then),
                std::min(kAhead, pixels - pixel));
      const int64_t p = std::min(pixel, pixels - most_pixels);
      const auto at_plane = planes + c * plane + p;
      const auto at_row = rows + p * row + c;
      if constexpr (to_rows)
        transpose_tile(at_plane, plane, at_row, row, most_channels, most_pixels);
      else
        transpose_tile(at_row, row, at_plane, plane, most_pixels, most_channels);
    }
  }
}

// The word that an element is moved as.
template <class T>
using WordOf = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

template <class T>
void planes_to_rows(const void* planes, int64_t plane, void* rows, int64_t row, int64_t channels, int64_t pixels) {
  using Word = WordOf<T>;
  transpose_planes<true>(static_cast<const Word*>(planes), plane, static_cast<Word*>(rows), row, channels, pixels);
}
template <class T>
void rows_to_planes(const void* rows, int64_t row, void* planes, int64_t plane, int64_t channels, int64_t pixels) {
  using Word = WordOf<T>;
  transpose_planes<false>(static_cast<Word*>(planes), plane, static_cast<const Word*>(rows), row, channels, pixels);
}

// Calls add(i, sum) with the sum of the lanes of each of `count` successive vectors, added in a fixed order. kLanes
// vectors are summed at once: the lanes of a single vector would be a chain of additions that wait for each other.
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
