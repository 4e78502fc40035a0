// The convolution of one or two rows of outputs, one or two vectors of channels at a time. The sums of neighbouring
// outputs slide over the input columns: a pixel is loaded once for both rows and added to every sum that it belongs to.
// A sum stays in its register until it is complete, and the next output takes that register, so that nothing is moved.
// Columns outside the image are skipped. Rows outside the image are rows of zeros.
#pragma once
#include "cpu/depthwise/block.h"

namespace rkl::cpu::RKL_ISA {

// Whether registers hold all weights of common small filters: with weights from memory, AVX-512 cores of AMD make
// multiply-adds at two thirds of their rate. Of 16 registers, the sums of two vectors in two rows make better use (3 x
// 3 with AVX2, Zen 4: 1.13 times as fast as the sums of one row beside 9 weights).
constexpr bool kHoldsWeights = kRegisters == 32;

// Whether windows of `taps` taps may write past the caches. With 16 registers, GCC would then keep the sums of 2 taps
// on the stack.
constexpr bool may_stream(int taps) { return kHoldsWeights || taps != 2; }

// K: taps of a row. S: columns from one output to the next (any number for one tap). R, V: rows and vectors of outputs.
// H: the filter's rows, where rows of outputs are S rows apart too; 0 for any height and distance.
template <class T, int K, int S, int R, int V, int H>
class Window {
  using P = Pixels<T>;
  static constexpr int M = (K + S - 1) / S;  // outputs that a column may belong to
  static constexpr int kUnits = (H + P::kRows - 1) / P::kRows;
  // Rows of the image that the rows of outputs before did not read, at most as many as the window reads.
  static constexpr int kNewest = H ? std::min(R * S, (kUnits + (R - 1) * S) * P::kRows) : R;

 public:
  static __attribute__((noinline)) void run(const Job<T>& job) {
    Window window(job);
    for (int64_t v = 0; v < job.vectors; v += V) {
      constexpr std::make_integer_sequence<int, M> phases;
      if (P::kLooksAhead && job.ahead)
        window.template slide<P::kLooksAhead>(phases);
      else
        window.template slide<false>(phases);
      window.next();
    }
  }

 private:
  // Initialisers beside the members, and put() written out in step(), would save 20 lines, but GCC 12 makes slower
  // windows of them at stride 2: ResNet-KL's 16 and 8 px in fp32 at 0.85 to 0.94 of the rate (one thread, Zen 5).
  RKL_INLINE explicit Window(const Job<T>& given)
      : job(given),
        rows_(given.rows),
        pitch_(K == 1 ? given.step * given.pitch : given.pitch),
        out_pitch_(given.out_pitch),
        inputs_(given.inputs),
        left_(given.left),
        count_(given.count),
        weights(given.weights),
        at_(given.at),
        vector_(0),
        read_(given.read.from),
        written_(given.written.from),
        read_step_((given.read.in_columns ? 1 : V) * given.read.step),
        written_step_((given.written.in_columns ? 1 : V) * given.written.step),
        newest_(given.ahead ? given.rows + (given.units + (R - 1) * given.shift) * P::kRows - kNewest : nullptr),
        ahead_(given.ahead) {
    RKL_UNROLL for (int r = 0; r < R; ++r) out_[r] = given.out[r];
  }

  RKL_INLINE void next() {
    weights += V * job.weight_vector;
    at_ += V * kLanes;
    vector_ += V * kLanes;
    if (job.read.in_columns) read_ = job.read.from + vector_ * sizeof(T);
    if (job.written.in_columns) written_ = job.written.from + vector_ * sizeof(T);
  }

  RKL_INLINE Vec weight(int v, int64_t place) const {
    return read<Vec>(weights + v * job.weight_vector + place * kLanes);
  }

  // The part of operand m that counts. With an odd number of filter rows, the last operand's lower pixel does not.
  static RKL_INLINE Vec part(Vec x, int m) { return H % P::kRows && m == kUnits - 1 ? P::upper_alone(x) : x; }

  template <int phase, int J>
  RKL_INLINE void held_column() {
    RKL_UNROLL for (int u = 0; u < kUnits + (R - 1) * S; ++u) {
      Vec x[V];
      P::load(rows_ + u * P::kRows, column_, x);
      RKL_UNROLL for (int r = 0; r < R; ++r) {
        const int m = u - r * S;
        if (m < 0 || m >= kUnits) continue;
        RKL_UNROLL for (int t = J; t < K; t += S)
          RKL_UNROLL for (int v = 0; v < V; ++v) {
            Vec& to = sum[r][(phase - (t - J) / S + M) % M][v];
            to = P::add(to, part(x[v], m), kHoldsWeights ? held[v][m * K + t] : weight(v, m * K + t));
          }
      }
    }
  }

  // Adds operand u to the sums of the first row of outputs, of the second, or of both.
  template <int phase, int J, bool first, bool second>
  RKL_INLINE void add_unit(int u) {
    Vec x[V];
    P::load(rows_ + u * P::kRows, column_, x);
    RKL_UNROLL for (int r = 0; r < R; ++r) {
      if (!(r ? second : first)) continue;
      const int m = r ? u - job.shift : u;
      const bool last = P::kRows > 1 && job.odd && m == job.units - 1;
      RKL_UNROLL for (int v = 0; v < V; ++v) {
        const Vec pixel = last ? P::upper_alone(x[v]) : x[v];
        const float* row = weights + v * job.weight_vector + m * job.weight_row;
        RKL_UNROLL for (int t = J; t < K; t += S) {
          Vec& to = sum[r][(phase - (t - J) / S + M) % M][v];
          to = P::add(to, pixel, read<Vec>(row + t * kLanes));
        }
      }
    }
  }

  template <int phase, int J>
  RKL_INLINE void column() {
    const int units = job.units, shift = job.shift, from = job.begin, to = job.end;
    if constexpr (H > 0) {
      held_column<phase, J>();
    } else if constexpr (R == 1) {
      for (int u = from; u < to; ++u) add_unit<phase, J, true, false>(u);
    } else {
      int u = from;
      for (; u < std::min({units, shift, to}); ++u) add_unit<phase, J, true, false>(u);
      u = std::max(u, shift);
      for (; u < std::min(units, to); ++u) add_unit<phase, J, true, true>(u);
      for (u = std::max({units, shift, from}); u < to; ++u) add_unit<phase, J, false, true>(u);
    }
  }

  RKL_INLINE void look_ahead() const {
    RKL_UNROLL for (int r = 0; r < kNewest; ++r) __builtin_prefetch(newest_[r] + column_ + ahead_, 0, 3);
  }

  template <int place>
  RKL_INLINE void begin(int64_t output) {
    RKL_UNROLL for (int r = 0; r < R; ++r)
      RKL_UNROLL for (int v = 0; v < V; ++v)
        sum[r][place][v] =
            read<Vec>((H ? job.start[0] : job.start[r] + output * job.start_step) + vector_ + v * kLanes);
  }

  template <int place>
  RKL_INLINE void write(int64_t output) {
    RKL_UNROLL for (int r = 0; r < R; ++r) {
      if (H || V > P::kTogether || !job.sums[0]) {
        P::store(out_[r] + to_, sum[r][place], may_stream(K) && job.streams);
        continue;
      }
      RKL_UNROLL for (int v = 0; v < V; ++v) store(job.sums[r] + (output * V + v) * kLanes, sum[r][place][v]);
    }
  }

  // Begins output i, adds the columns under its first S taps, and stores output i - (M - 1), which is then complete.
  template <bool looks_ahead, int phase, int... J>
  RKL_INLINE void step(int64_t i, std::integer_sequence<int, J...>) {
    begin<phase>(i);
    const int64_t c = (K == 1 ? job.step : S) * i - left_;
    const auto visit = [&](auto j) {
      if (exists(c + j, inputs_)) column<phase, j>();
      if (looks_ahead) look_ahead();
      column_ += pitch_;
    };
    (visit(std::integral_constant<int, J>()), ...);
    put<(phase + 1) % M>(i - (M - 1));
    if (read_step_) ask<R * S * S, false>(job.read, read_, read_step_);
    if (written_step_) ask<R, true>(job.written, written_, written_step_);
  }

  // Stores the output at to_, if there is one.
  template <int place>
  RKL_INLINE void put(int64_t output) {
    if (exists(output, count_)) write<place>(output);
    to_ += out_pitch_;
  }

  template <bool looks_ahead, int... phase>
  RKL_INLINE void slide(std::integer_sequence<int, phase...>) {
    if constexpr (H > 0 && kHoldsWeights)
      RKL_UNROLL for (int v = 0; v < V; ++v)
        RKL_UNROLL for (int i = 0; i < kUnits * K; ++i) held[v][i] = in_register(weight(v, i));
    constexpr std::make_integer_sequence<int, S> columns;
    const int64_t last = count_ + M - 1;  // the last outputs are complete behind the image's columns
    int64_t i = job.first;
    ((phase ? begin<phase>(i - M + phase) : void()), ...);
    column_ = at_ + ((K == 1 ? job.step : S) * i - job.left) * job.pitch;
    to_ = vector_ + (i - (M - 1)) * job.out_pitch;
    while (((i < last ? (step<looks_ahead, phase>(i++, columns), true) : false) && ...)) {
    }
  }

  const Job<T>& job;
  const T* const* const rows_;
  T* out_[R];
  // Copies of the job's values: the compiler reads the job again after each store, which could have changed it.
  const int64_t pitch_, out_pitch_;  // elements from one visited column, and from one output, to the next
  const int64_t inputs_, left_, count_;
  const float* weights;
  int64_t at_, vector_;  // elements from a row's start to this vector's first column; from the first vector to this one
  int64_t column_, to_;  // elements to the next column, and to the output that is complete next
  const char *read_, *written_;
  const int64_t read_step_, written_step_;
  const T* const* const newest_;
  const int64_t ahead_;
  Vec held[V][H && kHoldsWeights ? kUnits * K : 1];
  Vec sum[R][M][V];
};

constexpr int kMostTaps = 7;    // of a row at once; wider filters go in pieces
constexpr int kWindowTaps = 3;  // of a row that windows serve; blocks serve more

// make<K, S>() for K taps of a row and a step of S, 1 or 2: [S - 1][K - 1]. A single tap takes any step.
template <class Make, int... I>
constexpr auto by_taps(const Make& make, std::integer_sequence<int, I...>) {
  return std::array{std::array{make.template operator()<I + 1, 1>()...},
                    std::array{make.template operator()<I + 1, I ? 2 : 1>()...}};
}
constexpr std::make_integer_sequence<int, kMostTaps> kEveryTaps;

// Functions for one vector of channels, and for two where those are loaded together or registers hold the sums of both.
template <class T>
struct Code {
  using Run = void (*)(const Job<T>&);
  Run one = nullptr, two = nullptr;
};

template <class T, int K, int S, int B>
constexpr Code<T> block_code() {
  Code<T> code{&Block<T, K, S, B, 1>::run};
  if constexpr (Pixels<T>::kTogether == 2 || kRegisters == 32) code.two = &Block<T, K, S, B, 2>::run;
  return code;
}

template <class T, int K, int S, int R, int H>
constexpr Code<T> window_code() {
  // 18 weights would leave two rows too little room.
  constexpr bool fits = H * K < 9 || R == 1 || Pixels<T>::kRows == 2 || !kHoldsWeights;
  constexpr int kHeight = fits ? H : 0;
  Code<T> code{&Window<T, K, S, R, 1, H>::run};
  if constexpr (sizeof(T) == 2 || !kHoldsWeights) code.two = &Window<T, K, S, R, 2, kHeight>::run;
  return code;
}

// Windows, by the filter's height (0 for any) and the rows of outputs less 1; or blocks, by their outputs.
template <class T>
struct RowCode {
  Code<T> windows[kWindowTaps + 1][2] = {}, blocks[9] = {};
  bool in_blocks() const { return blocks[4].one; }
};

template <class T, int K, int S>
constexpr RowCode<T> code_for() {
  if constexpr (K > kWindowTaps) {
    RowCode<T> code;
    code.blocks[4] = block_code<T, K, S, 4>();
    code.blocks[7] = block_code<T, K, S, 7>();
    code.blocks[8] = block_code<T, K, S, 8>();
    return code;
  } else {
    return {{{window_code<T, K, S, 1, 0>(), window_code<T, K, S, 2, 0>()},
             {window_code<T, K, S, 1, 1>(), window_code<T, K, S, 2, 1>()},
             {window_code<T, K, S, 1, 2>(), window_code<T, K, S, 2, 2>()},
             {window_code<T, K, S, 1, 3>(), window_code<T, K, S, 2, 3>()}}};
  }
}

template <class T>
const RowCode<T>& row_code(int taps, int64_t step) {
  static constexpr auto codes = by_taps([]<int K, int S>() { return code_for<T, K, S>(); }, kEveryTaps);
  return codes[step > 1][taps - 1];
}

}  // namespace rkl::cpu::RKL_ISA
