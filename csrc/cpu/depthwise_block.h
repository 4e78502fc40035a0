// The arithmetic of depthwise convolution: R neighbouring outputs of one row, a vector of channels at a time. R sums
// stay in registers while the filter's rows go by; with K neighbouring taps in a row, each pixel is loaded once a row
// and used for up to K of the sums. Weights and filter gradients lie as (tap, channel) in vectors.
#pragma once
#include "cpu/vector_math.h"

namespace rkl::cpu::RKL_ISA {

// Where the block's input pixels lie, by the filter's row and the column from the block's leftmost.
template <class T>
struct Table {  // anywhere: pixels outside the image point to zeros, so that edges need no code of their own
  using Element = T;
  const T* const* pixels;
  int columns;

  struct Walk {
    const T* const* pixel;
    const T* operator*() const { return *pixel; }
    void operator++() { ++pixel; }
    void skip(int columns) { pixel += columns; }
  };
  Walk from(int row, int column) const { return {pixels + row * columns + column}; }
};

template <class T>
struct Lines {  // at even distances: inside the image, or in a scratch image with zeros around it
  using Element = T;
  const T* const* rows;
  int64_t column;  // elements from one column to the next

  struct Walk {
    const T* pixel;
    const int64_t column;
    const T* operator*() const { return pixel; }
    void operator++() { pixel += column; }
    void skip(int columns) { pixel += columns * column; }
  };
  Walk from(int row, int64_t i) const { return {rows[row] + i * column, column}; }
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

  int64_t at(int64_t v) const { return std::min(v * kLanes, last); }
};

// A filter's weights as vectors, a tap behind the other: a value a channel, or one value for all lanes.
struct LaneFilter {
  static constexpr bool kByLane = true;
  const float *weights, *bias;
  int64_t vector;  // floats from one vector's taps to the next's
  LaneFilter at(int64_t v) const { return {weights + v * vector, bias + v * kLanes, vector}; }
  Vec weight(int v, int64_t tap) const { return load(weights + v * vector + tap); }
  Vec first_sum(int v) const { return load(bias + v * kLanes); }
};
struct PlaneFilter {
  static constexpr bool kByLane = false;
  const float *weights, *bias;
  PlaneFilter at(int64_t) const { return *this; }
  Vec weight(int, int64_t tap) const { return broadcast(weights[tap]); }
  Vec first_sum(int) const { return broadcast(*bias); }
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
  const T* run;               // null where all is in the cache
  int64_t length, pitch;      // elements of a run, and from one run to the next
  int64_t asked = 0;          // of this run
  const T* beside = nullptr;  // another run that is read at the same time

  template <int elements>
  void ask() {
    constexpr int line = 64 / sizeof(T), count = (elements + line - 1) / line;
    if (!run) return;
    const T* next = run + asked;
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) __builtin_prefetch(next + i * line);
    if (beside) {
#pragma GCC unroll 32
      for (int i = 0; i < count; ++i) __builtin_prefetch(beside + asked + i * line);
    }
    asked += elements;
    if (asked < length) return;
    asked -= length;
    run += pitch;
    if (beside) beside += pitch;
  }
};

// Which of a block's columns may lie beyond the image. With a filter of `taps` centred on the outputs, half of it does
// at the edges: those columns are left out, up to half of all of a wide filter's on a narrow map.
enum class Edge { none, left, right, both };

// The code that a block runs: `taps` neighbouring taps of a row at once (0: each alone), `outputs`, `step` input
// columns apart. exact: a row has just so many taps.
template <int taps, int outputs, int step = 1, bool exact = true, Edge edge = Edge::none>
struct Block {
  static constexpr int kTaps = taps, kOutputs = outputs, kStep = step;
  static constexpr bool kExact = exact;
  static constexpr int kFirst = edge == Edge::left || edge == Edge::both ? taps / 2 : 0;
  static constexpr int kEnd = (outputs - 1) * step + taps - (edge == Edge::right || edge == Edge::both ? taps / 2 : 0);
};

#define RKL_INLINE __attribute__((always_inline)) inline

// kTaps taps of a row for V neighbouring vectors: tap k, at weights + k * to_next, adds the pixel k columns on to each
// sum.
template <class B, int V, class T, class Filter, class Walk>
RKL_INLINE void add_taps(Walk pixel, int64_t c, const Filter& filter, int64_t tap, int64_t to_next,
                         Vec (&sum)[V][B::kOutputs]) {
  constexpr int R = B::kOutputs, K = B::kTaps, S = B::kStep;
  Vec weight[V][K];
#pragma GCC unroll 2
  for (int i = 0; i < V; ++i)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) weight[i][k] = as_factor(filter.weight(i, tap + k * to_next), T{});
#pragma GCC unroll 24
  for (int j = B::kFirst; j < B::kEnd; ++j, ++pixel) {
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) {
      const Vec x = in_register(factor(*pixel + c + i * kLanes));
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k)
        if (const int r = j - k; r >= 0 && r % S == 0 && r / S < R)
          sum[i][r / S] = multiply_add(sum[i][r / S], x, weight[i][k], T{});
    }
  }
}

// A block's sums of V neighbouring vectors.
template <class B, int V, class Filter, class Pixels>
RKL_INLINE void convolve_vectors(const Pixels& pixels, const Taps& taps, const Filter& filter, int64_t c,
                                 Vec (&sum)[V][B::kOutputs]) {
  using T = typename Pixels::Element;
  constexpr int R = B::kOutputs, K = B::kTaps;
  const int64_t to_next = K > 1 ? (taps.column[1] - taps.column[0]) * kLanes : 0;
#pragma GCC unroll 2
  for (int i = 0; i < V; ++i) {
    const Vec first = filter.first_sum(i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[i][r] = first;
  }
  for (int i = 0; i < taps.rows; ++i) {
    const int64_t row = taps.row[i] * kLanes;
    if constexpr (B::kExact) {
      add_taps<B, V, T>(pixels.from(i, B::kFirst), c, filter, row + taps.column[0] * kLanes, to_next, sum);
      continue;
    }
    static_assert(B::kExact || V == 1);
    int next = 0;
    if constexpr (K > 0)
      for (; next + K <= taps.columns; next += K)
        add_taps<B, V, T>(pixels.from(i, next), c, filter, row + taps.column[next] * kLanes, to_next, sum);
    for (; next < taps.columns; ++next) {
      const Vec weight = as_factor(filter.weight(0, row + taps.column[next] * kLanes), T{});
      auto pixel = pixels.from(i, int(taps.at_column[next]));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r, pixel.skip(taps.step))
        sum[0][r] = multiply_add(sum[0][r], factor(*pixel + c), weight, T{});
    }
  }
}

// The outputs of a block with an activation, or of which not all exist. Not inlined: its call would keep the sums of
// all blocks in memory.
template <class T>
__attribute__((noinline)) void put_some(const Vec* sum, int count, const Outputs<T>& out, T* to) {
  for (int r = 0; r < count; ++r, to += out.pixel) {
    const Vec y = activate(out.act, sum[r], T{});
    if (out.past_caches)
      stream(to, y);
    else if (out.lanes < kLanes)
      store_some(to, y, out.lanes);
    else
      store(to, y);
  }
}

// One block's outputs of V neighbouring vectors, of which `to` is the first.
template <class B, int V, class Filter, class Pixels, class T>
RKL_INLINE void make_outputs(const Pixels& pixels, const Taps& taps, const Filter& filter, int64_t c, bool plain,
                             int count, int64_t pixel, const Outputs<T>& out, T* to) {
  constexpr int R = B::kOutputs;
  Vec sum[V][R];
  convolve_vectors<B, V>(pixels, taps, filter, c, sum);
  if (!plain || count < R) {
#pragma GCC unroll 2
    for (int i = 0; i < V; ++i) {
      Vec kept[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) kept[r] = sum[i][r];
      put_some(kept, count, out, to + i * kLanes);
    }
  } else if (out.past_caches) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r, to += pixel)
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) stream(to + i * kLanes, sum[i][r]);
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r, to += pixel)
#pragma GCC unroll 2
      for (int i = 0; i < V; ++i) store(to + i * kLanes, sum[i][r]);
  }
}

template <class B, class Filter, class Pixels, class T, class U>
void convolve(B, const Pixels& pixels, const Taps& taps, const Filter& filter, const Sweep& sweep,
              const Outputs<T>& out, Ahead<U>& asking) {
  constexpr int R = B::kOutputs;
  // Two vectors at a time share addresses and loops, a third of all instructions: 32 registers hold their 16 sums and 6
  // or 10 weights.
  constexpr bool kPairs = kLanes == 16 && B::kExact && B::kTaps <= 5 && Filter::kByLane;
  const bool plain = out.act == Activation::none && out.lanes == kLanes;
  // Copies, since a store could change what lies behind a reference.
  const Sweep s = sweep;
  const int64_t pixel = out.pixel;
  Ahead<U> ahead = asking;
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int count = block + 1 == s.blocks ? out.count_at_end : out.count;
    for (int64_t v = s.begin; v < s.end; ++v) {
      const int64_t c = block * s.block_input + s.at(v);
      T* to = out.first + block * s.block_output + s.at(v);
      ahead.template ask<R * B::kStep * kLanes>();
      if constexpr (kPairs)
        if (v + 1 < s.end && s.at(v + 1) == s.at(v) + kLanes) {
          ahead.template ask<R * B::kStep * kLanes>();
          make_outputs<B, 2>(pixels, taps, filter.at(v), c, plain, count, pixel, out, to);
          ++v;
          continue;
        }
      make_outputs<B, 1>(pixels, taps, filter.at(v), c, plain, count, pixel, out, to);
    }
  }
  asking = ahead;
}

// kTaps taps of a row of the filter's gradient, at sums + k * to_next.
template <class B, class T, class Walk>
RKL_INLINE void correlate_taps(Walk pixel, int64_t c, const Vec (&grad)[B::kOutputs], float* sums, int64_t to_next) {
  constexpr int R = B::kOutputs, K = B::kTaps, S = B::kStep;
  Vec sum[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) sum[k] = load(sums + k * to_next);
#pragma GCC unroll 24
  for (int j = B::kFirst; j < B::kEnd; ++j, ++pixel) {
    const Vec x = in_register(factor(*pixel + c));
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
      if (const int r = j - k; r >= 0 && r % S == 0 && r / S < R) sum[k] = multiply_add(sum[k], x, grad[r / S], T{});
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) store(sums + k * to_next, sum[k]);
}

// A sweep's share of a 3 x 3 filter's gradient where all its rows lie inside the image: vector by vector, so that the
// ten sums stay in registers for all of the row's blocks.
template <class B, class Pixels, class T, class U>
RKL_INLINE void correlate_3_by_3(const Pixels& pixels, const Taps& taps, const T* const* grads, float* sums,
                                 int64_t vector, int bias_tap, const Sweep& s, Ahead<U>& ahead) {
  constexpr int R = B::kOutputs, S = B::kStep;
  const int64_t to_next = (taps.column[1] - taps.column[0]) * kLanes;
  for (int64_t v = s.begin; v < s.end; ++v) {
    float *of_vector = sums + v * vector, *bias = of_vector + bias_tap * kLanes, *row[3];
    Vec sum[3][3], total = load(bias);
    for (int i = 0; i < 3; ++i) {
      row[i] = of_vector + (taps.row[i] + taps.column[0]) * kLanes;
      for (int k = 0; k < 3; ++k) sum[i][k] = load(row[i] + k * to_next);
    }
    for (int64_t block = 0; block < s.blocks; ++block) {
      const int64_t c = block * s.block_input + s.at(v), g = block * s.block_output + s.at(v);
      Vec grad[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total += widened(grad[r] = in_register(factor(grads[r] + g)), T{});
      ahead.template ask<R * S * kLanes>();
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        auto pixel = pixels.from(i, B::kFirst);
#pragma GCC unroll 24
        for (int j = B::kFirst; j < B::kEnd; ++j, ++pixel) {
          const Vec x = in_register(factor(*pixel + c));
#pragma GCC unroll 3
          for (int k = 0; k < 3; ++k)
            if (const int r = j - k; r >= 0 && r % S == 0 && r / S < R)
              sum[i][k] = multiply_add(sum[i][k], x, grad[r / S], T{});
        }
      }
    }
    store(bias, total);
    for (int i = 0; i < 3; ++i)
      for (int k = 0; k < 3; ++k) store(row[i] + k * to_next, sum[i][k]);
  }
}

// Adds the blocks' share of the filter's gradient to `sums`, a tap behind the other, and the sum of their output
// gradients behind the last tap. grads: the first block's output gradients, zeros where there is none.
template <class B, class Pixels, class T, class U>
void correlate(B, const Pixels& pixels, const Taps& taps, const T* const* grads, float* sums, int64_t vector,
               int bias_tap, const Sweep& sweep, Ahead<U>& asking) {
  constexpr int R = B::kOutputs, K = B::kTaps;
  const int64_t to_next = K > 1 ? (taps.column[1] - taps.column[0]) * kLanes : 0;
  const Sweep s = sweep;
  Ahead<U> ahead = asking;
  if constexpr (B::kExact && K == 3 && kLanes == 16)  // fewer registers would not hold them
    if (taps.rows == 3 && s.blocks > 1) {
      correlate_3_by_3<B>(pixels, taps, grads, sums, vector, bias_tap, s, ahead);
      asking = ahead;
      return;
    }
  for (int64_t block = 0; block < s.blocks; ++block) {
    for (int64_t v = s.begin; v < s.end; ++v) {
      const int64_t c = block * s.block_input + s.at(v), g = block * s.block_output + s.at(v);
      float* lane_sums = sums + v * vector;
      Vec grad[R], total{};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total += widened(grad[r] = in_register(factor(grads[r] + g)), T{});
      float* bias = lane_sums + bias_tap * kLanes;
      store(bias, load(bias) + total);
      ahead.template ask<R * B::kStep * kLanes>();
      for (int i = 0; i < taps.rows; ++i) {
        float* row = lane_sums + taps.row[i] * kLanes;
        if constexpr (B::kExact) {
          correlate_taps<B, T>(pixels.from(i, B::kFirst), c, grad, row + taps.column[0] * kLanes, to_next);
          continue;
        }
        int next = 0;
        if constexpr (K > 0)
          for (; next + K <= taps.columns; next += K)
            correlate_taps<B, T>(pixels.from(i, next), c, grad, row + taps.column[next] * kLanes, to_next);
        for (; next < taps.columns; ++next) {
          float* tap = row + taps.column[next] * kLanes;
          auto pixel = pixels.from(i, int(taps.at_column[next]));
          Vec sum = load(tap);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r, pixel.skip(taps.step)) sum = multiply_add(sum, factor(*pixel + c), grad[r], T{});
          store(tap, sum);
        }
      }
    }
  }
  asking = ahead;
}

}  // namespace rkl::cpu::RKL_ISA
