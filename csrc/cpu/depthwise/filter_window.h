// What one row of output gradients (two, where an operand is two pixels) adds to the filter's gradient, for one or two
// vectors of channels at a time. The output gradients slide over the image's columns. Registers hold those that meet a
// column, so that each is read once, and the row's sums. When a row is done, its sums are added to those of the rows
// before: so the error of a sum grows with the lengths of a row and a column, not with their product.
#pragma once
#include "cpu/depthwise/window_rows.h"

namespace rkl::cpu::RKL_ISA {

// One row of the filter: the pixels that it meets, and its sums, a vector a tap, crossed (pixels.h) like the pixels.
template <class T>
struct FilterRow {
  const T* row[Pixels<T>::kRows];
  float* sums;
};

template <class T>
struct FilterJob {
  const FilterRow<T>* rows;
  const T* grad[Pixels<T>::kRows];  // where each row of output gradients begins
  int64_t at, pitch, grad_at, grad_pitch, sums;
  int64_t vectors, sums_vector;                    // how many; floats from one vector's sums to the next vector's
  int64_t first, last, count, inputs, step, left;  // as in Job and Piece
  Prefetch read, beside;                           // of pixels; of output gradients
  int64_t ahead;  // as elements_ahead(), of the last row; 0 where nothing comes from far
};

// K: taps of a row. S: columns from one output to the next. Q: rows of the filter. V: vectors.
template <class T, int K, int S, int Q, int V>
class FilterWindow {
  using P = Pixels<T>;
  static constexpr int M = (K + S - 1) / S;

 public:
  static __attribute__((noinline)) void run(const FilterJob<T>& given) {
    FilterWindow window(given);
    for (int64_t v = 0; v < given.vectors; v += V) {
      constexpr std::make_integer_sequence<int, M> phases;
      if (P::kLooksAhead && given.ahead)
        window.template slide<P::kLooksAhead>(phases);
      else
        window.template slide<false>(phases);
      window.next();
    }
  }

 private:
  RKL_INLINE explicit FilterWindow(const FilterJob<T>& given) : job(given) {}

  RKL_INLINE void next() {
    at_ += V * kLanes;
    sums_ += V * job.sums_vector;
    if (job.read.in_columns) read_ = job.read.from + at_ * sizeof(T);
    if (job.beside.in_columns) beside_ = job.beside.from + at_ * sizeof(T);
  }

  template <int phase, int J>
  RKL_INLINE void column() {
    RKL_UNROLL for (int q = 0; q < Q; ++q) {
      Vec x[V];
      P::load(job.rows[q].row, column_, x);
      RKL_UNROLL for (int m = 0; m < M; ++m)
        RKL_UNROLL for (int v = 0; v < V; ++v)
          if (const int t = J + S * m; t < K) sum[q][t][v] = P::add(sum[q][t][v], x[v], grad[(phase - m + M) % M][v]);
    }
  }

  // Loads the gradient at output_; zeros where there is no such output.
  template <int place>
  RKL_INLINE void take(int64_t output) {
    Vec g[V] = {};
    if (exists(output, count_)) P::load(job.grad, output_, g);
    output_ += job.grad_pitch;
    RKL_UNROLL for (int v = 0; v < V; ++v) grad[place][v] = g[v];
  }

  // Loads the gradient of output i, and adds the columns under its first S taps.
  template <bool looks_ahead, int phase, int... J>
  RKL_INLINE void step(int64_t i, std::integer_sequence<int, J...>) {
    take<phase>(i);
    const int64_t c = S * i - left_;
    const auto visit = [&](auto j) {
      if (S == 1 || exists(c + j, inputs_)) column<phase, j>();
      if (looks_ahead) __builtin_prefetch(job.rows[Q - 1].row[0] + column_ + job.ahead, 0, 3);
      column_ += pitch_;
    };
    (visit(std::integral_constant<int, J>()), ...);
    if (read_step_) ask<P::kRows * S, false>(job.read, read_, read_step_);
    if (beside_step_) ask<P::kRows, false>(job.beside, beside_, beside_step_);
  }

  template <bool looks_ahead, int... phase>
  RKL_INLINE void slide(std::integer_sequence<int, phase...>) {
    RKL_UNROLL for (int q = 0; q < Q; ++q)
      RKL_UNROLL for (int t = 0; t < K; ++t)
        RKL_UNROLL for (int v = 0; v < V; ++v) sum[q][t][v] = Vec{};
    constexpr std::make_integer_sequence<int, S> columns;
    const int64_t last = job.last;
    int64_t i = job.first;
    output_ = at_ + job.grad_at + (i - M + 1) * job.grad_pitch;
    ((phase ? take<phase>(i - M + phase) : void()), ...);
    column_ = at_ + job.at + ((K == 1 ? job.step : S) * i - job.left) * job.pitch;
    while (((i < last ? (step<looks_ahead, phase>(i++, columns), true) : false) && ...)) {
    }
    RKL_UNROLL for (int q = 0; q < Q; ++q)
      RKL_UNROLL for (int t = 0; t < K; ++t)
        RKL_UNROLL for (int v = 0; v < V; ++v) {
          float* to = job.rows[q].sums + sums_ + v * job.sums_vector + t * kLanes;
          store(to, read<Vec>(to) + sum[q][t][v]);
        }
  }

  const FilterJob<T>& job;
  const int64_t pitch_ = K == 1 ? job.step * job.pitch : job.pitch;  // from a column that is visited to the next
  const int64_t inputs_ = job.inputs, left_ = job.left, count_ = job.count;
  int64_t at_ = 0, sums_ = job.sums;  // where this vector's channels and sums begin
  int64_t column_, output_;           // elements to the next column, and to the next output
  const char *read_ = job.read.from, *beside_ = job.beside.from;
  const int64_t read_step_ = (job.read.in_columns ? 1 : V) * job.read.step;
  const int64_t beside_step_ = (job.beside.in_columns ? 1 : V) * job.beside.step;
  Vec sum[Q][K][V], grad[M][V];
};

// The functions for one row of the filter and for `rows` rows, by vectors less 1.
template <class T>
struct FilterCode {
  using Run = void (*)(const FilterJob<T>&);
  Run one[2] = {}, many[2] = {};
  int rows = 0;
};

template <class T, int K, int S>
constexpr FilterCode<T> filter_code_for() {
  // As many that their sums fit into registers beside the gradients and a pixel.
  constexpr int rows = std::min(K, (kRegisters - (K + S - 1) / S - 1) / K);
  FilterCode<T> code{{&FilterWindow<T, K, S, 1, 1>::run}, {&FilterWindow<T, K, S, rows, 1>::run}, rows};
  if constexpr (Pixels<T>::kTogether == 2 && K <= kWindowTaps) {
    code.one[1] = &FilterWindow<T, K, S, 1, 2>::run;
    code.many[1] = &FilterWindow<T, K, S, rows, 2>::run;
  }
  return code;
}

template <class T>
const FilterCode<T>& filter_code(int taps, int64_t step) {
  static constexpr auto codes = by_taps([]<int K, int S>() { return filter_code_for<T, K, S>(); }, kEveryTaps);
  return codes[step > 1][taps - 1];
}

// Adds rows of output gradients to the filter's gradient. Sums: (vector, taps + 1, lane), the filter's taps row by row,
// then the bias.
template <class T>
class FilterRows {
  static constexpr int kRows = Pixels<T>::kRows;

 public:
  FilterRows(const Gather& forward, const Conv2d& g, const Lanes& lanes, bool wants_bias, int64_t image_row)
      : lanes_(lanes),
        wants_bias_(wants_bias),
        down_(lattices_of(forward.vertical, forward.in_h)),
        turn_(vectors_of_turn<T>((g.kernel_h + 1) * forward.in_w)),
        kernel_w_(g.kernel_w),
        taps_(g.kernel_h * g.kernel_w),
        zeros_(image_row) {
    for (const Lattice& l : down_) pairs_ = std::max(pairs_, ceil_div(l.count, 2));
    for (const Lattice& l : lattices_of(forward.horizontal, forward.in_w)) across_.emplace_back(l);
  }

  // Clears the sums of a tile's vectors before any row is added. sums: where those of vector 0 begin, here and below.
  void begin(float* sums, const Tile& tile) const {
    std::fill(sums + Lanes::at(tile.first_vector, 0, taps_ + 1), sums + Lanes::at(tile.last_vector, 0, taps_ + 1), 0.f);
  }

  // Uncrosses the sums of a tile's vectors when all rows are added.
  void finish(float* sums, const Tile& tile) const {
    constexpr int kTogether = Pixels<T>::kTogether;
    for (int64_t v = tile.first_vector; v < tile.last_vector && together(v) > 1; v += kTogether)
      for (int tap = 0; tap < taps_; ++tap) {
        Vec here[kTogether];
        for (int i = 0; i < kTogether; ++i) here[i] = read<Vec>(sums + Lanes::at(v + i, tap, taps_ + 1));
        Pixels<T>::uncross(here);
        for (int i = 0; i < kTogether; ++i) store(sums + Lanes::at(v + i, tap, taps_ + 1), here[i]);
      }
  }

 protected:
  int64_t lattices() const { return int64_t(down_.size()); }
  // Pairs of rows in the longest lattice.
  int64_t pairs() const { return pairs_; }
  // How many of the gradient's rows lie before those of `pair`.
  int64_t rows_before(int64_t pair) const { return 2 * pair * down_[0].pitch; }

  // Adds pair step % pairs() of lattice step / pairs(), for a tile's vectors.
  void add(const Image<const T>& in, const Image<const T>& grad, float* sums, int64_t step, const Tile& tile) {
    const int64_t i = step / pairs_, pair = step % pairs_;
    const Lattice* after = i + 1 < lattices() ? &down_[i + 1] : nullptr;
    for (int64_t j = 2 * pair; j < std::min(2 * pair + 2, down_[i].count); j += kRows)
      rows_of(in, grad, down_[i], after, j, tile, sums);
  }

 private:
  // How many vectors go at once from v on. Beside the sums of more taps there is no room for two.
  int64_t together(int64_t v) const { return kernel_w_ <= kWindowTaps ? vectors_together<T>(lanes_, v) : 1; }

  // after: the lattice whose rows come after this one's, or null.
  void rows_of(const Image<const T>& in, const Image<const T>& grad, const Lattice& down, const Lattice* after,
               int64_t j, const Tile& tile, float* sums) {
    const int64_t rows = std::min<int64_t>(kRows, down.count - j), top = down.step * j - down.left;
    rows_.clear();
    for (int a = 0; a < down.taps; ++a) {
      FilterRow<T> row{};
      bool any = false;
      for (int i = 0; i < kRows; ++i) {
        const int64_t c = top + a + i * down.step;
        const bool inside = i < rows && c >= 0 && c < down.inputs;
        row.row[i] = inside ? in.first + down.input(c) * in.row : zeros_.data();
        any = any || inside;
      }
      row.sums = sums + int64_t(a) * kernel_w_ * kLanes;
      if (any) rows_.push_back(row);
    }
    FilterJob<T> job{};
    for (int i = 0; i < kRows; ++i) job.grad[i] = i < rows ? grad.first + down.output(j + i) * grad.row : zeros_.data();
    const bool linear = tile.first_vector == 0 && tile.last_vector == lanes_.vectors();
    const RowsAhead ahead(down, j + rows, after, 0);
    const T *const read = in.first + ahead.read * in.row, *const beside = grad.first + ahead.written * grad.row;
    int64_t taken = 0;  // steps so far
    job.sums_vector = Lanes::at(1, 0, taps_ + 1);
    // One call makes all vectors of a turn, but for the last vector where it overlaps its neighbour.
    const int64_t whole = std::min(tile.last_vector, lanes_.channels / kLanes);
    for (int64_t v = tile.first_vector, vectors; v < tile.last_vector; v += vectors) {
      const int64_t here = together(v);
      vectors = std::max(here, std::min(turn_, whole - v) / here * here);
      const int64_t at = lanes_.at(v), of_vector = Lanes::at(v, 0, taps_ + 1);
      job.vectors = vectors;
      for (const auto& [l, pieces] : across_) {
        job.pitch = l.unit * in.pixel, job.grad_pitch = l.pitch * grad.pixel;
        job.at = l.origin * in.pixel + at, job.grad_at = l.first * grad.pixel + at;
        job.count = l.count, job.inputs = l.inputs, job.step = l.step;
        job.read = prefetch_of(read, linear, taken * kLanes, job.at, l.step * job.pitch,
                               down.unit * in.row / (linear ? std::clamp<int64_t>(l.step, 1, 2) : 1));
        job.beside = prefetch_of(beside, linear, taken * kLanes, job.grad_at, job.grad_pitch, down.pitch * grad.row);
        if (in.distance < Distance::beyond) job.read.step = 0;
        if (grad.distance < Distance::beyond) job.beside.step = 0;
        const int64_t columns_ahead = in.distance == Distance::far ? elements_ahead<T>(l.inputs, job.pitch) : 0;
        for (int64_t i = 0; wants_bias_ && i < vectors; ++i)
          add_bias(job, i, int(rows), sums + Lanes::at(v + i, taps_, taps_ + 1));
        taken += run(job, pieces, int(here), of_vector, columns_ahead) * vectors;
      }
    }
  }

  // `together`: vectors that a window takes at once.
  int64_t run(FilterJob<T>& job, const std::vector<Piece>& pieces, int together, int64_t sums, int64_t ahead) {
    int64_t taken = 0;
    for (const Piece& p : pieces) {
      const FilterCode<T>& code = filter_code<T>(p.taps, job.step);
      job.first = p.first, job.last = p.last, job.left = p.left;
      job.sums = sums + p.first_tap * kLanes;
      if (p.last == p.first) continue;
      for (size_t q = 0; q < rows_.size();) {
        job.rows = rows_.data() + q;
        const bool many = q + code.rows <= rows_.size();
        const size_t next = q + (many ? code.rows : 1);
        job.ahead = next == rows_.size() ? ahead : 0;
        (many ? code.many : code.one)[together - 1](job);
        q = next;
        // The first call prefetches for all.
        taken = std::max(taken, p.last - p.first);
        job.read = job.beside = nothing(rows_.data());
      }
    }
    return taken;
  }

  static void add_bias(const FilterJob<T>& job, int64_t v, int rows, float* sums) {
    Vec total{};
    for (int i = 0; i < rows; ++i)
      for (int64_t o = 0; o < job.count; ++o)
        total += load(job.grad[i] + job.grad_at + o * job.grad_pitch + v * kLanes);
    store(sums, read<Vec>(sums) + total);
  }

  const Lanes lanes_;
  const bool wants_bias_;
  const std::vector<Lattice> down_;
  int64_t pairs_ = 0;
  const int64_t turn_;
  const int kernel_w_, taps_;
  ZeroRow<T> zeros_;
  std::vector<Across> across_;
  std::vector<FilterRow<T>> rows_;
};

}  // namespace rkl::cpu::RKL_ISA
