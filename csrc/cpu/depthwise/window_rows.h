// Makes rows of outputs by windows: which window serves a row's taps, what it reads and where its sums go.
#pragma once
#include "cpu/depthwise/convolution_window.h"
#include "cpu/depthwise/pack.h"
#include "cpu/depthwise/strips.h"
#include "cpu/depthwise/tiling.h"
#include "cpu/kernels.h"
#include "cpu/simd/elementwise.h"

namespace rkl::cpu::RKL_ISA {

// An image. row, pixel: elements from one row, and from one pixel, to the next.
template <class T>
struct Image {
  T* first;
  int64_t row, pixel;
  Distance distance = Distance::held;
  bool streams = false;  // it is written past the caches; its vectors are then whole cache lines
};

// A row of zeros, for rows outside the image. Made when first read: for images of one row it is as large as the image.
template <class T>
class ZeroRow {
 public:
  explicit ZeroRow(int64_t size) : size_(size + kLanes) {}
  const T* data() {
    if (zeros_.empty()) zeros_.resize(size_);
    return zeros_.data();
  }

 private:
  const int64_t size_;
  LineVector<T> zeros_;
};

// How many vectors one call makes before another call reads the same pixels: half of the nearest cache, so that both
// find them there. (A call for each vector: gradients of 3 x 3 at stride 2 of 4 px took 1.7 times as long.)
template <class T>
int64_t vectors_of_turn(int64_t pixels) {
  constexpr int64_t kTurn = int64_t(16) << 10, kAtOnce = Pixels<T>::kAtOnce;
  return std::max<int64_t>(1, kTurn / (pixels * kLanes * int64_t(sizeof(T))) / kAtOnce) * kAtOnce;
}

// What one call prefetches of the row of an image that begins at `row`: from element `column` on, each step `pitch`
// elements further; or, where all calls' steps are one run of memory (linear), a vector a step from element `run` on.
template <class T>
Prefetch prefetch_of(const T* row, bool linear, int64_t run, int64_t column, int64_t pitch, int64_t rows_apart) {
  constexpr int64_t size = sizeof(T);
  const char* from = reinterpret_cast<const char*>(row + (linear ? run : column));
  return {from, (linear ? kLanes : pitch) * size, rows_apart * size, !linear};
}

// Makes rows of outputs. Each thread has one object.
template <class T>
class WindowRows {
  static constexpr int kRows = Pixels<T>::kRows, kTogether = Pixels<T>::kTogether;

 public:
  // finish: packed for the gather. strips: how many strips a row's columns make. streamed_pitch: bytes from one output
  // to the next where outputs may be written past the caches; else 0.
  WindowRows(const Gather& gather, const Lanes& lanes, const Finish& finish, int64_t image_row, int64_t strips = 1,
             int64_t streamed_pitch = 0)
      : lanes_(lanes),
        finish_(finish),
        down_(by_origin(lattices_of(gather.vertical, gather.in_h))),
        phases_across_(int(gather.horizontal.size())),
        zeros_(image_row) {
    for (const auto& lattices : down_)
      for (const Lattice& l : lattices) pairs_ = std::max(pairs_, ceil_div(l.count, 2 * kRows) * kRows);
    const float* weights = finish.weights;
    for (const Axis& down : gather.vertical)
      for (const Axis& across : gather.horizontal) {
        weights_.push_back(weights);
        weights += table_size<T>(down, across) * lanes.vectors();
      }
    const std::vector<Lattice> across = lattices_of(gather.horizontal, gather.in_w);
    turn_ = by_origin(across).size() == across.size() ? lanes.vectors()
                                                      : vectors_of_turn<T>((gather.vertical[0].taps + 1) * gather.in_w);
    int64_t most = 0;
    for (int64_t i = 0; i < strips; ++i) {
      strips_.push_back(strip_of<T>(across, i, strips, streamed_pitch));
      for (const auto& [l, pieces] : strips_[i].row)
        if (pieces.size() > 1) most = std::max(most, l.count + 2 * kMostTaps);
    }
    sums_.resize(2 * most * kTogether * kLanes);
  }

  // Whether every kernel that serves stores kAtOnce vectors at once. With 16 registers, blocks store one, and so do
  // rows in pieces.
  bool stores_all_at_once() const {
    const auto by_windows = [](const Across& across) {
      const int taps = across.pieces[0].taps;
      return across.pieces.size() == 1 && taps <= kWindowTaps && may_stream(taps);
    };
    return kTogether == Pixels<T>::kAtOnce || std::all_of(strips_[0].row.begin(), strips_[0].row.end(), by_windows);
  }

  // Pairs of rows in the longest lattice.
  int64_t pairs() const { return pairs_; }

  // How many of the image's rows lie before those of `pair`.
  int64_t rows_before(int64_t pair) const { return pair / kRows * 2 * kRows * down_[0][0].pitch; }

  // Step i makes pair i % pairs() of class i / pairs(). The classes go one after the other, so that the cache need only
  // hold the rows under the window of one class.
  int64_t classes() const { return int64_t(down_.size()); }
  int64_t steps() const { return classes() * pairs_; }

  // Makes the rows of a step, of a tile's vectors and strip. in, out: from row 0 and channel 0 on.
  void make(const Image<const T>& in, const Image<T>& out, int64_t step, const Tile& tile) {
    const int64_t i = step / pairs_, pair = step % pairs_, j = pair / kRows * 2 * kRows + pair % kRows;
    const Lattice* after = i + 1 < classes() ? down_[i + 1].data() : nullptr;
    for (const Lattice& down : down_[i])
      if (j < down.count) rows_of(in, out, down, after, j, tile);
  }

 private:
  // Groups lattices into classes that share no input: a dilation's lattices one by one, a stride's phases together.
  static std::vector<std::vector<Lattice>> by_origin(const std::vector<Lattice>& lattices) {
    std::vector<std::vector<Lattice>> classes;
    for (const Lattice& l : lattices) {
      const auto same = [&](const std::vector<Lattice>& c) { return c[0].origin == l.origin; };
      const auto found = std::find_if(classes.begin(), classes.end(), same);
      found == classes.end() ? classes.push_back({l}) : found->push_back(l);
    }
    return classes;
  }

  // What is common to all calls that make rows j and j + kRows of the lattice's outputs, or only j where that is the
  // last: those rows, and the image's rows that they read.
  Job<T> rows_job(const Image<const T>& in, const Image<T>& out, const Lattice& l, int64_t j) {
    const int rows = j + kRows < l.count ? 2 : 1;
    Job<T> job{};
    job.made = rows;
    job.units = operands<T>(l.taps);
    job.shift = int(l.step);
    job.odd = l.taps % kRows;
    for (int r = 0; r < 2; ++r) job.out[r] = out.first + l.output(j + std::min(r, rows - 1) * kRows) * out.row;
    const int units = job.units + (rows - 1) * job.shift;
    rows_.clear();
    job.begin = units, job.end = 0;
    const int64_t needed = l.taps + (rows - 1) * job.shift * kRows;
    for (int i = 0; i < units * kRows; ++i) {
      if (i >= needed) {  // this pixel does not count: any row that exists will do
        rows_.push_back(rows_.back());
        continue;
      }
      const int64_t c = l.step * j - l.left + i;
      const bool inside = c >= 0 && c < l.inputs;
      rows_.push_back(inside ? in.first + l.input(c) * in.row : zeros_.data());
      if (!inside) continue;
      job.begin = std::min(job.begin, i / kRows);
      job.end = i / kRows + 1;
    }
    job.rows = rows_.data();
    return job;
  }

  // The job that makes vectors [v, v + vectors) of the outputs of lattice `across`. It prefetches nothing.
  Job<T> job_of(const Job<T>& rows, const Image<const T>& in, const Image<T>& out, const Lattice& down,
                const Lattice& across, int64_t v, int64_t vectors) const {
    const int64_t at = lanes_.at(v), table = table_size<T>(down, across);
    Job<T> job = rows;
    job.weights = weights_[down.phase * phases_across_ + across.phase] + v * table;
    job.weight_row = int64_t(across.taps) * kLanes, job.weight_vector = table;
    job.at = across.origin * in.pixel + at, job.pitch = across.unit * in.pixel;
    job.start[0] = job.start[1] = finish_.bias + v * kLanes;
    for (T*& row : job.out) row += across.first * out.pixel + at;
    job.out_pitch = across.pitch * out.pixel;
    job.count = across.count, job.inputs = across.inputs, job.step = across.step;
    job.vectors = vectors;
    job.streams = out.streams && vectors % kLineVectors<T> == 0;  // only whole cache lines
    job.read = job.written = nothing(rows_.data());
    return job;
  }

  // after: the lattice whose rows come after this one's, or null.
  void rows_of(const Image<const T>& in, const Image<T>& out, const Lattice& down, const Lattice* after, int64_t j,
               const Tile& tile) {
    const Strip& strip = strips_[tile.strip];
    const Job<T> of_rows = rows_job(in, out, down, j);
    // What to prefetch: the rows that the next rows of outputs read, and those outputs. Where two pairs of rows
    // interleave, each pair prefetches half of what both need.
    const int64_t i = j % kRows;
    const RowsAhead ahead(down, j + i + 2 * kRows, after, i * of_rows.made);
    const bool linear = tile.first_vector == 0 && tile.last_vector == lanes_.vectors();
    const T* const read = in.first + ahead.read * in.row;
    const T* const written = out.first + ahead.written * out.row;
    int64_t taken = 0;  // steps so far
    const auto make = [&](const Across& across, int64_t v, int64_t vectors) {
      const Lattice& l = across.lattice;
      Job<T> job = job_of(of_rows, in, out, down, l, v, vectors);
      // Blocks prefetch what is near, too: without, 5 x 5 of 240 channels of 14 px in bf16 took 1.3 times as long.
      const Distance asks_from = l.taps > kWindowTaps ? Distance::near : Distance::beyond;
      if (in.distance >= asks_from)
        job.read =
            prefetch_of(read, linear, taken * kLanes + strip.read * in.pixel, l.first_input() * in.pixel + lanes_.at(v),
                        l.step * job.pitch, down.unit * in.row / (linear ? std::clamp<int64_t>(l.step, 1, 2) : 1));
      if (in.distance == Distance::far && job.units)  // not of a phase without taps, which reads no row
        job.ahead = elements_ahead<T>(std::min(l.step * l.count, l.inputs), job.pitch);
      if (out.distance >= asks_from && !out.streams)
        job.written = prefetch_of(written, linear, taken * kLanes + strip.written * out.pixel,
                                  l.first * out.pixel + lanes_.at(v), job.out_pitch, down.pitch * out.row);
      taken += run(job, across.pieces, down);
    };
    // Where one window makes a whole row, one call makes all vectors of a turn, but for the last vector where it
    // overlaps its neighbour.
    const int64_t whole = std::min(tile.last_vector, lanes_.channels / kLanes);
    for (int64_t start = tile.first_vector; start < tile.last_vector; start += turn_)
      for (const Across& across : out.streams && !strip.in_parts.empty() ? strip.in_parts : strip.row)
        for (int64_t v = start, vectors; v < std::min(start + turn_, tile.last_vector); v += vectors) {
          const int64_t rest = std::min(start + turn_, whole) - v;
          vectors = across.pieces.size() == 1 && rest > 0 ? rest : vectors_together<T>(lanes_, v);
          make(across, v, vectors);
        }
  }

  // Makes a job's outputs, activation included. Returns for how many steps it prefetched.
  int64_t run(Job<T>& job, const std::vector<Piece>& pieces, const Lattice& down) {
    if (finish_.act == Activation::none) return run_pieces(job, pieces, down);
    const Job<T> target = job;
    if (job.streams) keep_outputs(job);
    const int64_t taken = run_pieces(job, pieces, down);
    activate_outputs(job, target);
    return taken;
  }

  // Makes a job for each piece of a row's taps. All but the last leave sums in scratch; only the first prefetches.
  int64_t run_pieces(Job<T>& job, const std::vector<Piece>& pieces, const Lattice& down) {
    int64_t taken = 0;
    for (size_t p = 0; p < pieces.size(); ++p) {
      const Piece& piece = pieces[p];
      // The steps begin with the first output, whether a tap reaches it or not.
      job.first = std::min(piece.first, piece.most - 1), job.left = piece.left;
      const int64_t output = job.vectors * kLanes;
      float* scratch[2] = {sums_.data() + kMostTaps * output, sums_.data() + sums_.size() / 2 + kMostTaps * output};
      for (int r = 0; r < 2; ++r) job.sums[r] = p + 1 < pieces.size() ? scratch[r] : nullptr;
      const bool alone = pieces.size() == 1 && piece.taps && down.step == (piece.taps == 1 ? 1 : job.step);
      const RowCode<T>& code = row_code<T>(std::max(1, piece.taps), job.step);
      int64_t steps = job.count + piece.most - 1 - job.first;
      if (code.in_blocks()) {
        const int width = block_width(job.count);
        steps = ceil_div(job.count, width) * width;
        call(code.blocks[width], steps, job);
      } else {
        call(code.windows[alone && down.taps <= kWindowTaps ? down.taps : 0][job.made - 1], steps, job);
      }
      if (!p) taken = steps * job.vectors;
      job.weights += piece.taps * kLanes;
      job.start_step = output;
      job.read = job.written = nothing(rows_.data());
      for (int r = 0; r < 2; ++r) job.start[r] = scratch[r];
    }
    return taken;
  }

  // Makes vectors two by two, and an odd last one alone. steps: how often a vector prefetches.
  static void call(const Code<T>& code, int64_t steps, const Job<T>& given) {
    const int64_t pairs = code.two ? given.vectors / 2 * 2 : 0;
    if (pairs == given.vectors) return code.two(given);
    if (!pairs) return code.one(given);
    Job<T> job = given;
    job.vectors = pairs;
    code.two(job);
    job.vectors = 1;
    job.weights += pairs * job.weight_vector;
    job.at += pairs * kLanes;
    for (int r = 0; r < 2; ++r) job.start[r] += pairs * kLanes, job.out[r] += pairs * kLanes;
    for (Prefetch* p : {&job.read, &job.written})
      p->from += p->in_columns ? pairs * kLanes * int64_t(sizeof(T)) : steps * pairs * p->step;
    code.one(job);
  }

  // Sends the outputs to scratch, where activate_outputs() finds them in a cache.
  void keep_outputs(Job<T>& job) {
    job.streams = false;
    job.out_pitch = job.vectors * kLanes;
    const int64_t row = job.count * job.out_pitch;
    if (int64_t(outputs_.size()) < 2 * row) outputs_.resize(2 * row);
    for (int r = 0; r < 2; ++r) job.out[r] = outputs_.data() + r * row;
  }

  // Activates the outputs in a pass of its own, while they are in the nearest cache: beside the sums, a switch over
  // activations would cost the sums their registers.
  void activate_outputs(const Job<T>& made, const Job<T>& target) const {
    constexpr int kVectors = kLineVectors<T>;
    const int64_t channels = made.vectors * kLanes;
    for (int r = 0; r < made.made; ++r) {
      const T* from = made.out[r];
      T* to = target.out[r];
      if (!target.streams) {
        finish_rows<T>(from, nullptr, finish_.act, to, made.count, channels, made.out_pitch);
        continue;
      }
      for (int64_t o = 0; o < made.count; ++o, from += made.out_pitch, to += target.out_pitch)
        for (int64_t c = 0; c < channels; c += kVectors * kLanes) {
          Vec y[kVectors];
          for (int v = 0; v < kVectors; ++v) y[v] = activate(finish_.act, load(from + c + v * kLanes), T{});
          stream(to + c, y);
        }
    }
  }

  const Lanes lanes_;
  const Finish finish_;
  const std::vector<std::vector<Lattice>> down_;  // by class
  std::vector<Strip> strips_;
  int64_t pairs_ = 0, turn_;
  const int phases_across_;
  ZeroRow<T> zeros_;
  std::vector<const float*> weights_;  // of (phase down, phase across)
  std::vector<const T*> rows_;
  LineVector<float> sums_;
  LineVector<T> outputs_;
};

}  // namespace rkl::cpu::RKL_ISA
