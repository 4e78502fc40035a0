// The arithmetic of depthwise convolution: R neighbouring outputs of one row, a vector of channels at a time. R sums
// stay in registers while the filter's rows go by; with K neighbouring taps in a row, each pixel is loaded once a row
// and used for up to K of the sums. Weights and filter gradients lie as (tap, channel) in vectors.
#pragma once
#include "cpu/vector_math.h"

namespace rkl::cpu::RKL_ISA {

// Where the block's input pixels lie, by the filter's row and the column from the block's leftmost.
template <class T>
struct Table {  // anywhere: pixels outside the image point to zeros, so that edges need no code of their own
  const T* const* pixels;
  int columns;
  const T* at(int row, int column) const { return pixels[row * columns + column]; }
};

struct Padded {  // in a scratch image with zeros around it, kLanes channels wide
  const float* const* rows;
  const float* at(int row, int column) const { return rows[row] + column * kLanes; }
};

// The taps that the block's outputs use: rows x columns of the filter.
struct Taps {
  int rows, columns, step;
  const int* row;            // index of the row's first weight
  const int* column;         // index in the row
  const int64_t* at_column;  // input column of the first output; the next one's is `step` further
};

// The vectors that one call makes. In place they follow each other along a pixel's channels, and the last one is moved
// back so that it ends with the last channel: it may overlap its neighbour, which costs less than masks everywhere. In
// a scratch image there is one vector a pixel, and what follows are the row's next blocks.
struct Sweep {
  int64_t begin, end;
  int64_t input, output, last;  // elements from one vector to the next, and the furthest that one may start
  int64_t weight;               // floats from one vector's weights to the next's
  int64_t tap;                  // floats from one tap's weights to the next's

  static Sweep channels(int64_t begin, int64_t end, int64_t last, int64_t tap) {
    return {begin, end, kLanes, kLanes, last, kLanes, tap};
  }
  static Sweep blocks(int64_t count, int64_t input, int64_t output, int64_t tap) {
    return {0, count, input, output, INT64_MAX, 0, tap};
  }
  int64_t in(int64_t v) const { return std::min(v * input, last); }
  int64_t out(int64_t v) const { return std::min(v * output, last); }
};

template <class T>
struct Outputs {
  T* first;
  int64_t pixel;            // elements from one output to the next
  int count, count_at_end;  // outputs that exist; in the sweep's last vector
  int64_t below;            // elements from an input pixel to the one below it; 0 where that is in the cache
  Activation act;
  bool past_caches;
};

// Not inlined: the blocks are unrolled, and most have no activation.
__attribute__((noinline)) inline Vec activated(Activation act, Vec x) { return activate(act, x); }

// Asks for the pixels that the next row will read and this one did not. The rows of a block are too far apart, and its
// runs of channels too short, for the hardware to foresee this: without, NHWC 3 x 3 takes twice as long.
template <int R, class Pixels>
inline void prefetch_below(const Pixels& pixels, int rows, int64_t offset) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) __builtin_prefetch(pixels.at(rows - 1, r) + offset);
}

template <int K, int R, class Pixels, class T>
void convolve(const Pixels& pixels, const Taps& taps, const float* weights, const float* bias, const Sweep& sweep,
              const Outputs<T>& out) {
  for (int64_t v = sweep.begin; v < sweep.end; ++v) {
    const int64_t c = sweep.in(v);
    const float* lane_weights = weights + v * sweep.weight;
    Vec sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = load(bias + v * sweep.weight);
    if (out.below && taps.rows && taps.columns) prefetch_below<R>(pixels, taps.rows, c + out.below);
    for (int i = 0; i < taps.rows; ++i) {
      const float* row_weights = lane_weights + taps.row[i] * sweep.tap;
      if constexpr (K > 0) {
        Vec weight[K];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) weight[k] = load(row_weights + taps.column[k] * sweep.tap);
#pragma GCC unroll 16
        for (int j = 0; j < R + K - 1; ++j) {
          const Vec x = load(pixels.at(i, j) + c);
#pragma GCC unroll 8
          for (int k = 0; k < K; ++k)
            if (j - k >= 0 && j - k < R) sum[j - k] += x * weight[k];
        }
      } else {
        for (int k = 0; k < taps.columns; ++k) {
          const Vec weight = load(row_weights + taps.column[k] * sweep.tap);
          const int column = int(taps.at_column[k]);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r] += load(pixels.at(i, column + r * taps.step) + c) * weight;
        }
      }
    }
    T* first = out.first + sweep.out(v);
    const int count = v + 1 == sweep.end ? out.count_at_end : out.count;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (r >= count) break;
      const Vec y = out.act == Activation::none ? sum[r] : activated(out.act, sum[r]);
      if (out.past_caches)
        stream(first + r * out.pixel, y);
      else
        store(first + r * out.pixel, y);
    }
  }
}

// Adds the block's share of the filter's gradient to `sums`, and the sum of its output gradients behind the last tap.
// grads: the R output gradients, zeros where there is none.
template <int K, int R, class Pixels, class T>
void correlate(const Pixels& pixels, const Taps& taps, const T* const* grads, float* sums, int bias_tap, int64_t below,
               const Sweep& sweep) {
  for (int64_t v = sweep.begin; v < sweep.end; ++v) {
    const int64_t c = sweep.in(v), g = sweep.out(v);
    float* lane_sums = sums + v * sweep.weight;
    Vec grad[R], total{};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total += grad[r] = load(grads[r] + g);
    float* bias = lane_sums + bias_tap * sweep.tap;
    store(bias, load(bias) + total);
    if (below && taps.rows) prefetch_below<R>(pixels, taps.rows, c + below);
    for (int i = 0; i < taps.rows; ++i) {
      float* row_sums = lane_sums + taps.row[i] * sweep.tap;
      if constexpr (K > 0) {
        Vec sum[K];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) sum[k] = load(row_sums + k * sweep.tap);
#pragma GCC unroll 16
        for (int j = 0; j < R + K - 1; ++j) {
          const Vec x = load(pixels.at(i, j) + c);
#pragma GCC unroll 8
          for (int k = 0; k < K; ++k)
            if (j - k >= 0 && j - k < R) sum[k] += x * grad[j - k];
        }
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) store(row_sums + k * sweep.tap, sum[k]);
      } else {
        for (int k = 0; k < taps.columns; ++k) {
          float* tap = row_sums + taps.column[k] * sweep.tap;
          Vec sum = load(tap);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum += load(pixels.at(i, int(taps.at_column[k]) + r * taps.step) + c) * grad[r];
          store(tap, sum);
        }
      }
    }
  }
}

// Outputs of the next block of a row with `rest` left: 7 or 4, so that rows of 4, 8, 14, 16, 28, 56 and 112 have no
// waste. 7 sums, 7 weights and a pixel fit into the 16 registers of AVX2.
inline int block_width(int64_t rest) { return rest >= 18 || (rest % 4 && rest > 4) ? 7 : 4; }

// The same for a row whose blocks all have one width: 4 only where it saves more than an eighth of the work.
inline int row_block_width(int64_t row) {
  const int64_t by_7 = (row + 6) / 7 * 7, by_4 = (row + 3) / 4 * 4;
  return by_7 <= by_4 + row / 8 ? 7 : 4;
}

// Calls f with K (as a constant: 3, 5, 7, or 0 for any taps) and R (7 or 4) that fit the taps and the rest of the row.
template <class F>
inline void by_block(const Taps& taps, bool consecutive, int width, F&& f) {
  const auto with_width = [&](auto k) {
    if (width == 7)
      f(k, std::integral_constant<int, 7>{});
    else
      f(k, std::integral_constant<int, 4>{});
  };
  if (consecutive && taps.columns == 3)
    with_width(std::integral_constant<int, 3>{});
  else if (consecutive && taps.columns == 5)
    with_width(std::integral_constant<int, 5>{});
  else if (consecutive && taps.columns == 7)
    with_width(std::integral_constant<int, 7>{});
  else
    with_width(std::integral_constant<int, 0>{});
}

}  // namespace rkl::cpu::RKL_ISA
