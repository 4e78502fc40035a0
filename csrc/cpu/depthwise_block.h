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

// Vectors [begin, end) of a pixel's channels. The last one is moved back so that it ends with the last channel: it may
// overlap its neighbour, which costs less than a masked load everywhere.
struct Channels {
  int64_t begin, end, last;
  int64_t stride;  // vectors a tap, in floats
  int64_t channel(int64_t v) const { return v * kLanes < last ? v * kLanes : last; }
};

template <class T>
struct Outputs {
  T* first;
  int64_t pixel;  // elements from one output to the next
  int count;      // outputs that exist: the last block of a row may hang over
  Activation act;
  bool past_caches;
};

template <int K, int R, class Pixels, class T>
void convolve(const Pixels& pixels, const Taps& taps, const float* weights, const float* bias, const Channels& channels,
              const Outputs<T>& out) {
  for (int64_t v = channels.begin; v < channels.end; ++v) {
    const int64_t c = channels.channel(v);
    const float* lane_weights = weights + v * kLanes;
    Vec sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = load(bias + v * kLanes);
    for (int i = 0; i < taps.rows; ++i) {
      const float* row_weights = lane_weights + taps.row[i] * channels.stride;
      if constexpr (K > 0) {
        Vec weight[K];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) weight[k] = load(row_weights + taps.column[k] * channels.stride);
#pragma GCC unroll 16
        for (int j = 0; j < R + K - 1; ++j) {
          const Vec x = load(pixels.at(i, j) + c);
#pragma GCC unroll 8
          for (int k = 0; k < K; ++k)
            if (j - k >= 0 && j - k < R) sum[j - k] += x * weight[k];
        }
      } else {
        for (int k = 0; k < taps.columns; ++k) {
          const Vec weight = load(row_weights + taps.column[k] * channels.stride);
          const int column = int(taps.at_column[k]);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r] += load(pixels.at(i, column + r * taps.step) + c) * weight;
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (r >= out.count) break;
      const Vec y = out.act == Activation::none ? sum[r] : activate(out.act, sum[r]);
      if (out.past_caches)
        stream(out.first + r * out.pixel + c, y);
      else
        store(out.first + r * out.pixel + c, y);
    }
  }
}

// Adds the block's share of the filter's gradient to `sums`, and the sum of its output gradients behind the last tap.
// grads: the R output gradients, zeros where there is none.
template <int K, int R, class Pixels, class T>
void correlate(const Pixels& pixels, const Taps& taps, const T* const* grads, float* sums, int bias_tap,
               const Channels& channels) {
  for (int64_t v = channels.begin; v < channels.end; ++v) {
    const int64_t c = channels.channel(v);
    float* lane_sums = sums + v * kLanes;
    Vec grad[R], total{};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total += grad[r] = load(grads[r] + c);
    float* bias = lane_sums + bias_tap * channels.stride;
    store(bias, load(bias) + total);
    for (int i = 0; i < taps.rows; ++i) {
      float* row_sums = lane_sums + taps.row[i] * channels.stride;
      if constexpr (K > 0) {
        Vec sum[K];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) sum[k] = load(row_sums + k * channels.stride);
#pragma GCC unroll 16
        for (int j = 0; j < R + K - 1; ++j) {
          const Vec x = load(pixels.at(i, j) + c);
#pragma GCC unroll 8
          for (int k = 0; k < K; ++k)
            if (j - k >= 0 && j - k < R) sum[k] += x * grad[j - k];
        }
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) store(row_sums + k * channels.stride, sum[k]);
      } else {
        for (int k = 0; k < taps.columns; ++k) {
          float* tap = row_sums + taps.column[k] * channels.stride;
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
