// Sums over pixels, serial, of what is in cache. A pointwise filter's gradient: each output's gradient times each
// channel. The pointwise step's tiles make it: their rows are outputs here, and their channels are pixels. And a bias's
// gradient, the sums of a matrix's columns.
#pragma once
#include "cpu/separable/pointwise_rows.h"

namespace rkl::cpu::RKL_ISA {

// Whether factors are read in place: columns fill vectors, and rows do not lie a power of 2 apart, where they would
// share few of the cache's sets.
template <class T>
bool lie_well(int64_t row, int64_t columns) {
  return sizeof(T) == 4 && columns % kLanes == 0 && row % 256;
}

// Copies some columns of the pixels' rows as factors: (factor, column).
template <class T>
FloatRows copied(const T* from, int64_t row, int64_t pixels, int64_t columns, float* copy, int64_t copy_row) {
  float* to = copy;
  for (int64_t p = 0; p < pixels; p += kChannelsOfFactor<T>, from += kChannelsOfFactor<T> * row, to += copy_row)
    for (int64_t i = 0; i < columns; i += kLanes) store(to + i, load_factors(from + i, row, pixels - p, columns - i));
  return {copy, copy_row};
}

// Adds to a strip of the sums. A tile's sums start from zero and are then added: one chain of additions over all pixels
// would round as often as there are pixels. Rows in which the last tile overlaps the one before it are added once.
template <int V, class T>
void add_strip(const Factors& dz, int64_t outputs, const FloatRows& hidden, float* sums, bool fresh) {
  constexpr int64_t kRow = PointwiseFilter::kOutputs, kWidth = V * kLanes, kFloats = kLine / int64_t(sizeof(float));
  const float zeros[kWidth] = {};
  alignas(kLine) float tile[kTileRows<V> * kWidth];
  for_tiles<V>(outputs, [&](int64_t first, int64_t next, int64_t height) {
    // The sums of all channels exceed the second-level cache: prefetched while the tile is made, 1.1 times as fast (728
    // channels, AVX2).
    for (int64_t r = next - first; r < height; ++r)
      for (int64_t i = 0; i < kWidth; i += kFloats) __builtin_prefetch(sums + (first + r) * kRow + i, 1, 3);
    const Factors x{dz.first + first * dz.row, dz.row, dz.step, dz.count};
    make_rows<V, T>(height, x, hidden, {zeros, 0}, tile, kWidth, kLanes, false);
    for (int64_t r = next - first; r < height; ++r)
      for (int64_t i = 0; i < kWidth; i += kLanes) {
        float* const to = sums + (first + r) * kRow + i;
        const Vec more = load(tile + r * kWidth + i);
        store(to, fresh ? more : load(to) + more);
      }
  });
}

template <class T>
void add_pointwise_share(const PointwiseShare& p) {
  constexpr int64_t kBlock = PointwiseFilter::kOutputs;
  float* const copy = p.scratch + p.piece * PointwiseShare::packed_row(p.outputs);
  for (int64_t first = 0; first < p.pixels; first += p.piece) {
    const int64_t pixels = std::min(p.piece, p.pixels - first);
    const T* dz = static_cast<const T*>(p.dz) + first * p.dz_row;
    const T* hidden = static_cast<const T*>(p.hidden) + first * p.hidden_row;
    FloatRows left{reinterpret_cast<const float*>(dz), p.dz_row};
    if (!lie_well<T>(p.dz_row, p.outputs))
      left = copied(dz, p.dz_row, pixels, p.outputs, p.scratch, PointwiseShare::packed_row(p.outputs));
    for_strips(0, ceil_div(p.channels, kLanes), [&](int64_t v, auto strip) {
      // Wider rows than a strip's are copied: in place, each would lie on a page of its own.
      const int64_t column = v * kLanes, columns = std::min<int64_t>(strip() * kLanes, p.channels - column);
      float* const sums = p.sums + column / kBlock * p.sums_block + column % kBlock;
      FloatRows right{reinterpret_cast<const float*>(hidden + column), p.hidden_row};
      if (p.hidden_row > kStrip * kLanes || !lie_well<T>(p.hidden_row, columns))
        right = copied(hidden + column, p.hidden_row, pixels, columns, copy, strip() * kLanes);
      add_strip<strip(), Operand<T>>({left.first, 1, left.row, factors_of<T>(pixels)}, p.outputs, right, sums,
                                     p.fresh && !first);
    });
  }
}

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
