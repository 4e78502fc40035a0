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

  struct Walk {
    const T* const* pixel;
    const T* operator*() const { return *pixel; }
    void operator++() { ++pixel; }
  };
  const T* at(int row, int column) const { return pixels[row * columns + column]; }
  Walk from(int row, int column) const { return {pixels + row * columns + column}; }
};

template <class T>
struct Lines {  // at even distances: inside the image, or in a scratch image with zeros around it
  const T* const* rows;
  int64_t column;  // elements from one column to the next

  struct Walk {
    const T* pixel;
    const int64_t column;
    const T* operator*() const { return pixel; }
    void operator++() { pixel += column; }
  };
  const T* at(int row, int64_t i) const { return rows[row] + i * column; }
  Walk from(int row, int64_t i) const { return {at(row, i), column}; }
};

// The taps that the block's outputs use: rows x columns of the filter.
struct Taps {
  int rows, columns, step;
  const int* row;            // index of the row's first weight
  const int* column;         // index in the row: neighbours differ by the same everywhere
  const int64_t* at_column;  // input column of the first output; the next one's is `step` further
  bool consecutive;          // columns are neighbours
};

// What one call makes: neighbouring blocks of a row, and of each some vectors. In place the vectors follow each other
// along a pixel's channels, and the last one is moved back so that it ends with the last channel: it may overlap its
// neighbour, which costs less than masks everywhere.
struct Sweep {
  int64_t blocks, block_input, block_output;  // and the elements from one to the next
  int64_t begin, end;                         // vectors
  int64_t last;                               // the furthest element that a vector may start at
  int64_t weight;                             // floats from one vector's weights to the next's
  int64_t tap;                                // floats from one tap's weights to the next's

  int64_t at(int64_t v) const { return std::min(v * kLanes, last); }
};

// A filter's weights as vectors: a value a channel, or one value for all lanes.
struct LaneFilter {
  const float *weights, *bias;
  Vec weight(int64_t at) const { return load(weights + at); }
  Vec first_sum(int64_t at) const { return load(bias + at); }
};
struct PlaneFilter {
  const float *weights, *bias;
  Vec weight(int64_t at) const { return broadcast(weights[at]); }
  Vec first_sum(int64_t) const { return broadcast(*bias); }
};

template <class T>
struct Outputs {
  T* first;
  int64_t pixel;            // elements from one output to the next
  int count, count_at_end;  // outputs that exist; in the sweep's last block
  Activation act;
  bool past_caches;
  int lanes = kLanes;  // of a vector, that exist
};

// Asks for memory that will be read soon, a line at a time: blocks do so between their sums. They read a few pixels
// of several rows, too short runs for the hardware to foresee; without this, NHWC 3 x 3 takes two to three times as
// long. In the order of addresses, since that is a third faster than in the order of use.
template <class T>
struct Ahead {
  const T* run;           // null where all is in the cache
  int64_t length, pitch;  // elements of a run, and from one run to the next
  int64_t asked = 0;      // of this run

  void ask(int64_t elements) {
    constexpr int64_t line = 64 / sizeof(T);
    if (!run) return;
#pragma GCC unroll 1
    for (int64_t i = 0; i < elements; i += line) {
      __builtin_prefetch(run + asked);
      asked += line;
      if (asked >= length) asked = 0, run += pitch;
    }
  }
};

// The code that a block runs: `kTaps` neighbouring taps of a row at once (0: each alone), kOutputs outputs, kStep input
// columns apart. kWholeRow: the outputs are all of an image's row and the filter is centred on them, so that the
// columns beyond the image, up to half of those of a wide filter on a narrow map, are left out.
template <int taps, int outputs, int step = 1, bool whole_row = false>
struct Block {
  static constexpr int kTaps = taps, kOutputs = outputs, kStep = step;
  static constexpr int kFirst = whole_row ? taps / 2 : 0;
  static constexpr int kEnd = whole_row ? taps / 2 + outputs : (outputs - 1) * step + taps;
};

// Not inlined: the blocks are unrolled, and most have no activation.
__attribute__((noinline)) inline Vec activated(Activation act, Vec x) { return activate(act, x); }

template <class B, class Filter, class Pixels, class T, class U>
void convolve(B, const Pixels& pixels, const Taps& taps, const Filter& filter, const Sweep& sweep,
              const Outputs<T>& out, Ahead<U>& ahead) {
  constexpr int R = B::kOutputs, K = B::kTaps;
  const int64_t to_next = K > 1 ? (taps.column[1] - taps.column[0]) * sweep.tap : 0;
  for (int64_t block = 0; block < sweep.blocks; ++block) {
    const int count = block + 1 == sweep.blocks ? out.count_at_end : out.count;
    for (int64_t v = sweep.begin; v < sweep.end; ++v) {
      const int64_t c = block * sweep.block_input + sweep.at(v), lanes = v * sweep.weight;
      Vec sum[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r] = filter.first_sum(lanes);
      ahead.ask(R * B::kStep * B::kStep * kLanes);
      for (int i = 0; i < taps.rows; ++i) {
        int next = 0;
        if constexpr (K > 0) {
          for (; next + K <= taps.columns; next += K) {
            Vec weight[K];
            int64_t tap = lanes + (taps.row[i] + taps.column[next]) * sweep.tap;
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k, tap += to_next) weight[k] = filter.weight(tap);
            auto pixel = pixels.from(i, next + B::kFirst);
#pragma GCC unroll 24
            for (int j = B::kFirst; j < B::kEnd; ++j, ++pixel) {
              const Vec x = in_register(load(*pixel + c));
#pragma GCC unroll 8
              for (int k = 0; k < K; ++k)
                if (const int r = j - k; r >= 0 && r % B::kStep == 0 && r / B::kStep < R)
                  sum[r / B::kStep] += x * weight[k];
            }
          }
        }
        for (; next < taps.columns; ++next) {
          const Vec weight = filter.weight(lanes + (taps.row[i] + taps.column[next]) * sweep.tap);
          const int column = int(taps.at_column[next]);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum[r] += load(pixels.at(i, column + r * taps.step) + c) * weight;
        }
      }
      T* first = out.first + block * sweep.block_output + sweep.at(v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if (r >= count) break;
        const Vec y = out.act == Activation::none ? sum[r] : activated(out.act, sum[r]);
        if (out.past_caches)
          stream(first + r * out.pixel, y);
        else if (out.lanes < kLanes)
          store_some(first + r * out.pixel, y, out.lanes);
        else
          store(first + r * out.pixel, y);
      }
    }
  }
}

// Adds the blocks' share of the filter's gradient to `sums`, and the sum of their output gradients behind the last tap.
// grads: the first block's output gradients, zeros where there is none.
template <class B, class Pixels, class T, class U>
void correlate(B, const Pixels& pixels, const Taps& taps, const T* const* grads, float* sums, int bias_tap,
               const Sweep& sweep, Ahead<U>& ahead) {
  constexpr int R = B::kOutputs, K = B::kTaps;
  const int64_t to_next = K > 1 ? (taps.column[1] - taps.column[0]) * sweep.tap : 0;
  for (int64_t block = 0; block < sweep.blocks; ++block) {
    for (int64_t v = sweep.begin; v < sweep.end; ++v) {
      const int64_t c = block * sweep.block_input + sweep.at(v), g = block * sweep.block_output + sweep.at(v);
      float* lane_sums = sums + v * sweep.weight;
      Vec grad[R], total{};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total += grad[r] = load(grads[r] + g);
      float* bias = lane_sums + bias_tap * sweep.tap;
      store(bias, load(bias) + total);
      ahead.ask(R * B::kStep * B::kStep * kLanes);
      for (int i = 0; i < taps.rows; ++i) {
        float* row_sums = lane_sums + taps.row[i] * sweep.tap;
        int next = 0;
        if constexpr (K > 0) {
          for (; next + K <= taps.columns; next += K) {
            Vec sum[K];
            float* tap = row_sums + taps.column[next] * sweep.tap;
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) sum[k] = load(tap + k * to_next);
            auto pixel = pixels.from(i, next + B::kFirst);
#pragma GCC unroll 24
            for (int j = B::kFirst; j < B::kEnd; ++j, ++pixel) {
              const Vec x = in_register(load(*pixel + c));
#pragma GCC unroll 8
              for (int k = 0; k < K; ++k)
                if (const int r = j - k; r >= 0 && r % B::kStep == 0 && r / B::kStep < R)
                  sum[k] += x * grad[r / B::kStep];
            }
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) store(tap + k * to_next, sum[k]);
          }
        }
        for (; next < taps.columns; ++next) {
          float* tap = row_sums + taps.column[next] * sweep.tap;
          const int column = int(taps.at_column[next]);
          Vec sum = load(tap);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) sum += load(pixels.at(i, column + r * taps.step) + c) * grad[r];
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

// Calls f with the block that serves the taps: one of `width` (7 or 4) outputs, or for a whole row of `width` (4, 7 or
// 8), which takes 3, 5 or 7 taps. Filters wider than 7 go by 7 taps and what remains.
template <class F>
inline void by_block(const Taps& taps, int width, bool whole_row, F&& f) {
  using std::integral_constant;
  const auto with_width = [&](auto k, auto step) {
    if (width == 7)
      f(Block<k(), 7, step()>{});
    else
      f(Block<k(), 4, step()>{});
  };
  const auto with_row = [&](auto k, auto) {
    if (width == 8)
      f(Block<k(), 8, 1, true>{});
    else if (width == 7)
      f(Block<k(), 7, 1, true>{});
    else
      f(Block<k(), 4, 1, true>{});
  };
  const auto with_taps = [&](auto step, auto&& g) {
    if (taps.columns >= 7)
      g(integral_constant<int, 7>{}, step);
    else if (taps.columns >= 5)
      g(integral_constant<int, 5>{}, step);
    else
      g(integral_constant<int, 3>{}, step);
  };
  const integral_constant<int, 1> one;
  if (whole_row)
    with_taps(one, with_row);
  else if (!taps.consecutive || taps.columns < 3 || taps.step > 2)
    with_width(integral_constant<int, 0>{}, one);
  else if (taps.step == 1)
    with_taps(one, with_width);
  else
    with_taps(integral_constant<int, 2>{}, with_width);
}

}  // namespace rkl::cpu::RKL_ISA
