// The pointwise step over rows of channels, by tiles of some rows and some vectors of outputs. A tile's sums stay in
// registers while the channels go by: each weight is loaded once a tile, and each channel of a row is broadcast to all
// lanes. Bias and activation are done before the tile leaves the nearest cache.
#pragma once
#include "cpu/depthwise/pixels.h"
#include "cpu/simd/elementwise.h"
#include "cpu/simd/transpose.h"

namespace rkl::cpu::RKL_ISA {

// A factor is a word of memory: an fp32 number, or two neighbouring bf16 channels where an instruction multiplies both.
// That instruction is Pixels<T>::add, which multiplies two pixels in the depthwise step.
template <class T>
constexpr int kChannelsOfFactor = Pixels<T>::kRows;

// Whether rows of this type are factors as they lie in memory. If not, they are widened first.
template <class T>
constexpr bool kRowsAreFactors = kChannelsOfFactor<T> == 2 || sizeof(T) == 4;

// The type that factors are multiplied as.
template <class T>
using Operand = std::conditional_t<kRowsAreFactors<T>, T, float>;

template <class T>
int64_t factors_of(int64_t channels) {
  return ceil_div(channels, kChannelsOfFactor<T>);
}

// Vectors of outputs in a strip, and rows of a tile: as many sums as leave registers for the weights and a factor.
constexpr int kStrip = kRegisters / 8;
template <int V>
constexpr int kTileRows = std::min((kRegisters - 2 - V) / V, 12);

// Loads a vector of factors from a row of numbers, or from two rows where a factor is a pair. The second row may not
// exist. Takes up to kLanes columns; zeros beyond.
template <class T>
Vec load_factors(const T* from, int64_t row, int64_t rows, int64_t columns) {
  constexpr int kNumbers = kChannelsOfFactor<T>;
  T some[kNumbers][kLanes] = {};
  const T* here[kNumbers];
  for (int i = 0; i < kNumbers; ++i) {
    here[i] = i < rows && columns >= kLanes ? from + i * row : some[i];
    if (i < rows && columns < kLanes) std::copy_n(from + i * row, columns, some[i]);
  }
  Vec factors[1];
  Pixels<T>::load(here, 0, factors);
  return factors[0];
}

// The weights of vector v of a filter: (factor, lane), for as many factors as there are lanes, from factor `first` on.
template <class T>
void load_weights(const PointwiseFilter& filter, int64_t v, int64_t first, Vec (&to)[kLanes]) {
  const T* weight = static_cast<const T*>(filter.weight);
  constexpr int kChannels = kChannelsOfFactor<T>;
  const int64_t outputs = std::min<int64_t>(kLanes, filter.outputs - v * kLanes);
  const int64_t factors = std::min<int64_t>(kLanes, factors_of<T>(filter.channels) - first);
  for (int64_t i = 0; i < kLanes; ++i) to[i] = Vec{};
  if (!filter.by_channel) {
    for (int64_t i = 0; i < outputs; ++i) {
      const T* from = weight + (v * kLanes + i) * filter.channels + first * kChannels;
      if constexpr (kChannels == 2)
        to[i] = load_some(reinterpret_cast<const float*>(from), factors);
      else
        to[i] = load_some(from, factors);
    }
    return transpose(to);
  }
  for (int64_t f = 0; f < factors; ++f) {
    const int64_t channel = (first + f) * kChannels;
    to[f] = load_factors(weight + channel * filter.outputs + v * kLanes, filter.outputs, filter.channels - channel,
                         outputs);
  }
}

// Packs a filter as (strip, bias and factors, vector, lane). A strip is the vectors that are made at once. Without a
// bias, zeros take its place.
template <class T>
void pack_pointwise(const PointwiseFilter& filter, int64_t first, int64_t last, float* packed) {
  const T* bias = static_cast<const T*>(filter.bias);
  const int64_t factors = factors_of<T>(filter.channels), vectors = ceil_div(filter.outputs, kLanes);
  const int64_t end = std::min(vectors, last * PointwiseFilter::kOutputs / kLanes);
  for (int64_t v = first * PointwiseFilter::kOutputs / kLanes; v < end; ++v) {
    const int64_t strip = v / kStrip * kStrip, width = std::min<int64_t>(kStrip, vectors - strip) * kLanes;
    float* to = packed + (strip * (factors + 1) + v - strip) * kLanes;
    store(to, bias ? load_up_to(bias + v * kLanes, filter.outputs - v * kLanes) : Vec{});
    for (int64_t f = 0; f < factors; f += kLanes) {
      Vec weights[kLanes];
      load_weights<T>(filter, v, f, weights);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, factors - f); ++i) store(to + (f + i + 1) * width, weights[i]);
    }
  }
}

// The factors that a tile reads. row, step: floats from one row, and from one factor, to the next.
struct Factors {
  const float* first;
  int64_t row, step, count;
};
// Rows of floats: a factor's weights or channels; or what a tile's sums begin with, the bias or the sums of other
// factors.
struct FloatRows {
  const float* first;
  int64_t row;  // floats from one row to the next
};

// Makes R rows of a strip of V vectors. last: outputs of the last vector.
template <int R, int V, class T, class Out>
__attribute__((noinline)) void make_tile(Factors x, FloatRows weights, FloatRows start, Out* out, int64_t out_row,
                                         int64_t last, bool streams) {
  Vec sum[R][V];
  RKL_UNROLL for (int r = 0; r < R; ++r)
    RKL_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = read<Vec>(start.first + r * start.row + v * kLanes);
  int64_t left = x.count;
  do {  // no `for`: the compiler would keep the sums in memory for the case of no round
    Vec weight[V];
    RKL_UNROLL for (int v = 0; v < V; ++v) weight[v] = in_register(read<Vec>(weights.first + v * kLanes));
    RKL_UNROLL for (int r = 0; r < R; ++r) {
      const Vec factor = (Vec)(read<uint32_t>(x.first + r * x.row) - VecBits{});
      RKL_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = Pixels<T>::add(sum[r][v], factor, weight[v]);
    }
    weights.first += weights.row;
    x.first += x.step;
  } while (--left > 0);
  // With AVX2, streaming stores gain nothing on a Zen 4, and a quarter to a half on an Ice Lake (mnv1-112, kb-86).
  if constexpr (RKL_LANES >= 8 && V % kLineVectors<Out> == 0)
    if (streams) {
      RKL_UNROLL for (int r = 0; r < R; ++r, out += out_row) stream(out, sum[r]);
      return;
    }
  RKL_UNROLL for (int r = 0; r < R; ++r, out += out_row) {
    RKL_UNROLL for (int v = 0; v + 1 < V; ++v) store(out + v * kLanes, sum[r][v]);
    store_up_to(out + (V - 1) * kLanes, sum[r][V - 1], last);
  }
}

// The most factors whose weights for a strip stay in a core's cache.
constexpr int64_t kMostFactors = 1024;

// Makes a tile of 1 or kTileRows<V> rows.
template <int V, class T, class Out>
void make_rows(int64_t rows, const Factors& x, const FloatRows& weights, const FloatRows& start, Out* out,
               int64_t out_row, int64_t last, bool streams) {
  rows == 1 ? make_tile<1, V, T>(x, weights, start, out, out_row, last, streams)
            : make_tile<kTileRows<V>, V, T>(x, weights, start, out, out_row, last, streams);
}

// Calls f(row, next, height) for each tile of `rows` rows: its first row, the first that no tile before it has, and how
// many it has. The last tile overlaps the one before it. Fewer rows than a tile has go one by one.
template <int V, class F>
RKL_INLINE void for_tiles(int64_t rows, F&& f) {
  const int64_t height = rows < kTileRows<V> ? 1 : kTileRows<V>;
  for (int64_t next = 0; next < rows; next += height) f(std::min(next, rows - height), next, height);
}

// Makes a strip of the outputs, from vector `first` on, at most kMostFactors factors at a time. row_bias: a strip for
// each row, or null. All sums but the last alternate between two halves of `sums`: a tile that overlaps another must
// begin with the same sums.
template <int V, class T>
void make_strip(const PointwiseRows& p, const float* in, int64_t factors, int64_t first, const float* packed,
                const float* row_bias, float* sums) {
  constexpr int64_t kWidth = V * kLanes;
  const float* weights = packed + first * (factors + 1) * kLanes;
  const int64_t columns = std::min<int64_t>(kWidth, p.outputs - first * kLanes), last = columns - kWidth + kLanes;
  const int64_t pieces = ceil_div(factors, kMostFactors);
  FloatRows start{weights, 0};
  if (row_bias) start = {row_bias, kStrip * kLanes};
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t from = factors * piece / pieces, count = factors * (piece + 1) / pieces - from;
    const FloatRows w{weights + (from + 1) * kWidth, kWidth};
    float* const kept = sums + piece % 2 * p.rows * kWidth;
    for_tiles<V>(p.rows, [&](int64_t row, int64_t, int64_t height) {
      const Factors x{in + row * factors + from, factors, 1, count};
      const FloatRows begin{start.first + row * start.row, start.row};
      if (piece + 1 < pieces)
        return make_rows<V, Operand<T>>(height, x, w, begin, kept + row * kWidth, kWidth, kLanes, false);
      T* const out = static_cast<T*>(p.out) + row * p.out_row + first * kLanes;
      make_rows<V, Operand<T>>(height, x, w, begin, out, p.out_row, last, p.streams);
      if (p.act != Activation::none) finish_rows<T>(out, nullptr, p.act, out, height, columns, p.out_row);
    });
    start = {kept, kWidth};
  }
}

// Calls f(v, V) for each strip of the vectors [first, end): V vectors from v on.
template <class F>
void for_strips(int64_t first, int64_t end, F&& f) {
  for (int64_t v = first; v < end; v += kStrip) {
    const int64_t here = std::min<int64_t>(kStrip, end - v);
    if (here == 1) f(v, std::integral_constant<int, 1>{});
    if (here == 2) f(v, std::integral_constant<int, 2>{});
    if constexpr (kStrip == 4) {
      if (here == 3) f(v, std::integral_constant<int, 3>{});
      if (here == 4) f(v, std::integral_constant<int, 4>{});
    }
  }
}

template <class T>
void pointwise_rows(const PointwiseRows& p, int64_t first, int64_t last, const float* packed) {
  const int64_t factors = factors_of<T>(p.channels), vectors = ceil_div(p.outputs, kLanes);
  const int64_t size = sizeof(float), end = std::min(vectors, last * PointwiseFilter::kOutputs / kLanes);
  const Scratch wide(kRowsAreFactors<T> ? 0 : p.rows * factors * size);
  const Scratch sums(factors > kMostFactors ? 2 * p.rows * kStrip * kLanes * size : 0);
  const Scratch bias(p.row_bias ? p.rows * kStrip * kLanes * size : 0);
  for (int64_t r = 0; p.row_bias && r < p.rows; ++r)
    std::fill_n(bias.as<float>() + r * kStrip * kLanes, kStrip * kLanes, float(static_cast<const T*>(p.row_bias)[r]));
  const float* in = kRowsAreFactors<T> ? static_cast<const float*>(p.in) : wide.as<float>();
  if (!kRowsAreFactors<T>) widen<T>(p.in, wide.as<float>(), p.rows * factors);
  for_strips(first * PointwiseFilter::kOutputs / kLanes, end,
             [&](int64_t v, auto strip) {
               make_strip<strip(), T>(p, in, factors, v, packed, bias.as<float>(), sums.as<float>());
             });
  if (p.streams) end_stream();
}

}  // namespace rkl::cpu::RKL_ISA
