// The convolution of a row of outputs with more taps than a window has registers for. A block is some neighbouring
// outputs of one or two vectors of channels. Registers hold its sums and the weights of one filter row while the pixels
// under them go by, each loaded once a filter row.
#pragma once
#include "cpu/depthwise/job.h"

namespace rkl::cpu::RKL_ISA {

// K: taps of a row. S: columns from one output to the next. B, V: outputs and vectors of a block.
template <class T, int K, int S, int B, int V>
class Block {
  using P = Pixels<T>;
  static constexpr int kColumns = (B - 1) * S + K;
  static constexpr int kLines = std::max(1, V / kLineVectors<T>);  // cache lines of an output

 public:
  // Both rows of a block are made before the next block: they share the weights and most pixels, which are then in the
  // nearest cache (7 x 7 at 8 px and 256 channels, whose weights fill that cache alone: 1.2 times as fast).
  static __attribute__((noinline)) void run(const Job<T>& job) {
    Job<T> rows[2] = {row_alone(job, 0), row_alone(job, 1)};
    // Outputs whose taps all lie inside the image.
    const int64_t inner = job.left <= 0 ? 0 : ceil_div(job.left, S), end = (job.inputs + job.left - K) / S + 1;
    for (int64_t v = 0; v < job.vectors; v += V) {
      for (int64_t o = 0; o < job.count; o += B)
        for (int r = 0; r < job.made; ++r) {
          Job<T>& here = rows[r];
          if (o >= inner && o + B <= std::min(end, here.count))
            make<false>(here, o);
          else
            make<true>(here, o);
          here.read.from += B * here.read.step, here.written.from += B * here.written.step;
        }
      for (int r = 0; r < job.made; ++r) next(job, r, v + V, rows[r]);
    }
  }

 private:
  // A job that makes row r of the given one as its first row.
  static RKL_INLINE Job<T> row_alone(const Job<T>& given, int r) {
    Job<T> job = given;
    const int skipped = r * job.shift;
    job.rows += skipped * P::kRows;
    job.begin = std::max(0, job.begin - skipped);
    job.end = std::min(job.units, job.end - skipped);
    job.start[0] = job.start[r], job.out[0] = job.out[r], job.sums[0] = job.sums[r];
    job.read.from += r * job.read.row, job.written.from += r * job.written.row;
    for (Prefetch* p : {&job.read, &job.written})
      if (!p->in_columns) p->step *= V;
    return job;
  }

  // Moves the job of row r on to vector v.
  static RKL_INLINE void next(const Job<T>& job, int r, int64_t v, Job<T>& here) {
    here.weights += V * here.weight_vector;
    here.at += V * kLanes, here.out[0] += V * kLanes, here.start[0] += V * kLanes;
    const int64_t beside = v * kLanes * int64_t(sizeof(T));
    if (here.read.in_columns) here.read.from = job.read.from + r * job.read.row + beside;
    if (here.written.in_columns) here.written.from = job.written.from + r * job.written.row + beside;
  }

  template <bool to_write>
  static RKL_INLINE void ask(const Prefetch& p, int b, int row) {
    RKL_UNROLL for (int line = 0; line < kLines; ++line)
      __builtin_prefetch(p.from + b * p.step + row * p.row + line * kLine, to_write, 2);
  }

  template <bool edge>
  static RKL_INLINE void make(const Job<T>& job, int64_t o) {
    const int64_t c = S * o - job.left, at = job.at + c * job.pitch;
    const int64_t from = edge ? std::max<int64_t>(0, -c) : 0;
    const int64_t to = edge ? std::min<int64_t>(kColumns, job.inputs - c) : kColumns;
    RKL_UNROLL for (int b = 0; b < B; ++b) {
      RKL_UNROLL for (int row = 0; row < S * S; ++row) ask<false>(job.read, b, row);
    }
    Vec sum[B][V];
    RKL_UNROLL for (int b = 0; b < B; ++b)
      RKL_UNROLL for (int v = 0; v < V; ++v) {
        sum[b][v] = read<Vec>(job.start[0] + (o + b) * job.start_step + v * kLanes);
      }
    const int whole = P::kRows > 1 && job.odd && job.end == job.units ? job.end - 1 : job.end;
    for (int u = job.begin; u < whole; ++u) add<edge, false>(job, u, at, int(from), int(to), sum);
    if (whole < job.end) add<edge, true>(job, whole, at, int(from), int(to), sum);
    const int64_t count = edge ? std::min<int64_t>(B, job.count - o) : B;
    RKL_UNROLL for (int b = 0; b < B; ++b) {
      ask<true>(job.written, b, 0);
      if (b >= count) continue;
      if (!job.sums[0]) {
        P::store(job.out[0] + (o + b) * job.out_pitch, sum[b], job.streams);
        continue;
      }
      RKL_UNROLL for (int v = 0; v < V; ++v) store(job.sums[0] + ((o + b) * V + v) * kLanes, sum[b][v]);
    }
  }

  // Adds the columns [from, to) of operand u that lie under the block.
  template <bool edge, bool upper>
  static RKL_INLINE void add(const Job<T>& job, int u, int64_t at, int from, int to, Vec (&sum)[B][V]) {
    const float* weights = job.weights + u * job.weight_row;
    const T* const* rows = job.rows + u * P::kRows;
    Vec weight[K][V];
    RKL_UNROLL for (int t = 0; t < K; ++t)
      RKL_UNROLL for (int v = 0; v < V; ++v) {
        weight[t][v] = in_register(read<Vec>(weights + v * job.weight_vector + t * kLanes));
      }
    RKL_UNROLL for (int j = 0; j < kColumns; ++j, at += job.pitch) {
      if (edge && j < from) continue;
      if (edge && j >= to) break;
      Vec x[V];
      P::load(rows, at, x);
      RKL_UNROLL for (int v = 0; v < V; ++v) {
        if (upper) x[v] = P::upper_alone(x[v]);
        RKL_UNROLL for (int t = 0; t < K; ++t)
          if (const int b = j - t; b >= 0 && b % S == 0 && b / S < B)
            sum[b / S][v] = P::add(sum[b / S][v], x[v], weight[t][v]);
      }
    }
  }
};

// The width of a row's blocks: 8 or 7, whichever makes fewer outputs in all, or 4 in short rows.
inline int block_width(int64_t row) {
  const int64_t by_8 = ceil_div(row, 8) * 8, by_7 = ceil_div(row, 7) * 7, by_4 = ceil_div(row, 4) * 4;
  if (row < 7 || by_4 + row / 8 < std::min(by_8, by_7)) return 4;
  return by_8 <= by_7 ? 8 : 7;
}

}  // namespace rkl::cpu::RKL_ISA
