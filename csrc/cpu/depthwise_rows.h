// Rows of outputs out of blocks of them, for images whose channels lie together (NHWC), and what both layouts need:
// the taps of a row, the filters and their gradients as vectors.
#pragma once
#include "cpu/depthwise_select.h"
#include "cpu/gather.h"

namespace rkl::cpu::RKL_ISA {

// Which channel a lane of a vector stands for.
struct Lanes {
  int64_t channels;
  bool nhwc;

  // Whether blocks read and write the images where they lie: channels lie together and fill a vector.
  bool in_place() const { return nhwc && channels >= kLanes; }
  int64_t vectors() const { return (channels + kLanes - 1) / kLanes; }
  // Where lane 0 of a vector's tap lies among weights or sums: the taps of a vector follow each other.
  static int64_t at(int64_t v, int64_t tap, int64_t taps) { return (v * taps + tap) * kLanes; }
  int64_t last() const { return in_place() ? channels - kLanes : 0; }
  // Images whose channels share a vector: more than one where NCHW images have few channels.
  int64_t images() const { return nhwc ? 1 : std::max<int64_t>(1, kLanes / channels); }

  // In place, the last vector ends with the last channel. -1 for an idle lane.
  int64_t channel(int64_t v, int lane) const {
    if (in_place()) return std::min(v * kLanes, last()) + lane;
    if (images() > 1) return lane < images() * channels ? lane % channels : -1;
    return v * kLanes + lane < channels ? v * kLanes + lane : -1;
  }
  // Whether this lane's sum counts: not where the last vector overlaps its neighbour, nor where the lane is idle.
  bool counts(int64_t v, int lane) const { return channel(v, lane) >= v * kLanes; }
};

// What a task works on: a band of rows of one image (or one group of images that share a vector), some vectors of it.
struct Tile {
  int64_t image, first_vector, last_vector, first_row, last_row;
};

// The tasks of one pass: images x groups of vectors x bands of rows.
struct Tiling {
  int64_t images, vectors, group, rows, band;

  int64_t groups() const { return (vectors + group - 1) / group; }
  int64_t bands() const { return (rows + band - 1) / band; }
  int64_t units() const { return images * bands(); }

  // Band `unit % bands` of an image with `height` rows, which need not be the `rows` that the bands were made for.
  Tile tile(int64_t unit, int64_t g, int64_t height) const {
    const int64_t b = unit % bands();
    return {unit / bands(), g * group, std::min(vectors, (g + 1) * group), height * b / bands(),
            height * (b + 1) / bands()};
  }
};

// Of a core's second-level cache, what a task may fill with the rows that it works on.
constexpr int64_t kCacheBytes = int64_t(640) << 10;

// What becomes of the sums of a convolution.
struct Finish {
  const float* weights;
  const float* bias;
  Activation act;
  bool past_caches;
};

// Filters (C, taps) or a bias (C, 1) as (vector, tap, lane) in fp32.
template <class T>
std::vector<float> as_lanes(const T* values, int taps, const Lanes& lanes) {
  std::vector<float> out(lanes.vectors() * taps * kLanes);
  for (int64_t v = 0; values && v < lanes.vectors(); ++v)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t c = lanes.channel(v, lane);
      for (int tap = 0; c >= 0 && tap < taps; ++tap)
        out[Lanes::at(v, tap, taps) + lane] = float(values[c * taps + tap]);
    }
  return out;
}

// The slices' sums (slice, vector, tap, lane) added in their order: the gradients (C, taps) and, of the last row, (C).
template <class T>
void reduce_sums(const std::vector<float>& sums, int64_t slices, int taps, const Lanes& lanes, T* dweight, T* dbias) {
  const int64_t size = (taps + 1) * kLanes, slice_size = lanes.vectors() * size;
  torch::stable::parallel_for(0, lanes.vectors(), kGrain / (slices * size) + 1, [&](int64_t begin, int64_t end) {
    std::vector<double> total(size);
    for (int64_t v = begin; v < end; ++v) {
      std::fill(total.begin(), total.end(), 0.);
      for (int64_t slice = 0; slice < slices; ++slice) {
        const float* from = sums.data() + slice * slice_size + v * size;
        for (int64_t i = 0; i < size; ++i) total[i] += from[i];
      }
      for (int tap = 0; tap <= taps; ++tap) {
        double* lane_total = total.data() + tap * kLanes;
        // Where images share the vector, lane by lane of each channel.
        for (int lane = int(lanes.channels); lanes.images() > 1 && lane < kLanes; ++lane)
          if (lanes.counts(v, lane)) lane_total[lane % lanes.channels] += lane_total[lane];
        for (int lane = 0; lane < std::min<int64_t>(kLanes, lanes.channels); ++lane) {
          if (!lanes.counts(v, lane)) continue;
          const int64_t c = lanes.channel(v, lane);
          if (tap < taps && dweight)
            dweight[c * taps + tap] = T(float(lane_total[lane]));
          else if (tap == taps && dbias)
            dbias[c] = T(float(lane_total[lane]));
        }
      }
    }
  });
}

// The taps of one row of outputs: those of the filter's rows that fall inside the image, and all columns. Set anew for
// each row, in buffers that are kept.
class RowTaps {
 public:
  RowTaps(const Gather& gather, const Conv2d& g)
      : gather_(gather), kernel_w_(g.kernel_w), kernel_size_(g.kernel_h * g.kernel_w) {
    for (const Axis& axis : gather.horizontal) {
      columns_.emplace_back(axis.offset);
      for (int64_t& at : columns_.back()) at -= axis.offset.front();
    }
  }

  void set_row(int64_t h) {
    const int64_t phases = int64_t(gather_.vertical.size());
    const Axis& axis = gather_.vertical[h % phases];
    tap_.clear();
    in_row_.clear();
    for (int t = 0; t < axis.taps(); ++t) {
      const int64_t row = h / phases * axis.step + axis.offset[t];
      if (row < 0 || row >= gather_.in_h) continue;
      tap_.push_back(axis.tap[t] * kernel_w_);
      in_row_.push_back(row);
    }
  }

  int rows() const { return int(tap_.size()); }
  int kernel_size() const { return kernel_size_; }
  int64_t in_row(int i) const { return in_row_[i]; }

  Taps taps(size_t phase) const {
    const Axis& axis = gather_.horizontal[phase];
    return {rows(), axis.taps(), axis.step, tap_.data(), axis.tap.data(), columns_[phase].data(), axis.consecutive()};
  }

  // Whether the taps are centred on their outputs, which are as many as the inputs, so that there are blocks for edges.
  bool centred(size_t phase) const {
    const Axis& axis = gather_.horizontal[phase];
    return gather_.horizontal.size() == 1 && axis.step == 1 && is_exact(taps(phase)) && axis.count == gather_.in_w &&
           axis.offset.front() == -(axis.taps() / 2);
  }

  // Whether there is a block for all of a row's outputs at once.
  bool whole_row(size_t phase) const {
    const int64_t count = gather_.horizontal[phase].count;
    return (count == 4 || count == 7 || count == 8) && centred(phase);
  }

  // Input column of a block's first tap, and the columns that the block spans from there.
  int64_t first_column(size_t phase, int64_t output) const {
    const Axis& axis = gather_.horizontal[phase];
    return axis.taps() ? output * axis.step + axis.offset.front() : 0;
  }
  int columns(size_t phase, int width) const {
    const Axis& axis = gather_.horizontal[phase];
    return axis.taps() ? (width - 1) * axis.step + int(columns_[phase].back()) + 1 : 0;
  }

 private:
  const Gather& gather_;
  const int kernel_w_, kernel_size_;
  std::vector<std::vector<int64_t>> columns_;  // a phase: input columns from the first tap's
  std::vector<int> tap_;
  std::vector<int64_t> in_row_;
};

// Rows of dense NHWC images of at least kLanes channels. One object a thread: it keeps the blocks' table of pixels.
template <class T>
class NhwcRows {
 public:
  NhwcRows(const Gather& gather, const Conv2d& g, const Lanes& lanes)
      : gather_(gather), taps_(gather, g), lanes_(lanes), zeros_(lanes.channels) {}

  // A few rows a band, and channels in groups so narrow that the rows which a filter spans stay in the cache; yet not
  // so narrow that memory is read in short runs (33 px, 2048 channels, dilation 12: 28 ms in runs of 384 bytes, 20 ms
  // in runs of 2 KiB), unless the filter itself would not fit (31 x 31: 23 ms for 24 vectors, 17.7 ms for 4).
  static Tiling tiling(const Conv2d& g, const Lanes& lanes) {
    const int64_t span = (int64_t(g.kernel_h - 1) * g.dilation_h + 1) * g.in_w * 4 * kLanes;
    const int64_t rows_fit = std::max<int64_t>(kCacheBytes / (2 * span), 512 / kLanes);
    const int64_t filter_fits =
        std::max<int64_t>((int64_t(64) << 10) / kLanes / (g.kernel_h * g.kernel_w), 64 / kLanes);
    const int64_t group = std::min({rows_fit, filter_fits, lanes.vectors()});
    return {g.batch, lanes.vectors(), group, g.out_h, std::min(g.out_h, 8192 / (g.out_w * group * kLanes) + 1)};
  }

  // The tile's rows of the output.
  void convolve_rows(const T* in, const Finish& finish, T* out, const Tile& tile) {
    const int64_t channels = lanes_.channels, phases = int64_t(gather_.horizontal.size());
    const LaneFilter filter{finish.weights, finish.bias, taps_.kernel_size() * kLanes};
    for (int64_t h = tile.first_row; h < tile.last_row; ++h) {
      taps_.set_row(h);
      Ahead<T> ahead = next_rows(in, tile, h);
      T* row = out + (tile.image * gather_.out_h + h) * gather_.out_w * channels;
      for (int64_t phase = 0; phase < phases; ++phase) {
        const int64_t first = gather_.horizontal[phase].first;
        for_blocks(in, tile, phase,
                   [&](auto block, const auto& pixels, const Taps& taps, const Sweep& sweep, const Span& span) {
                     const Outputs<T> outputs{row + (first + span.first * phases) * channels,
                                              phases * channels,
                                              block.kOutputs,
                                              span.count,
                                              finish.act,
                                              finish.past_caches};
                     convolve(block, pixels, taps, filter, sweep, outputs, ahead);
                   });
      }
    }
  }

  // Adds the tile's rows of the output's gradient to the filter's gradient.
  void correlate_rows(const T* in, const T* grad, float* sums, int bias_tap, const Tile& tile) {
    const int64_t channels = lanes_.channels, vector = (bias_tap + 1) * kLanes;
    for (int64_t h = tile.first_row; h < tile.last_row; ++h) {
      taps_.set_row(h);
      const T* row = grad + (tile.image * gather_.out_h + h) * gather_.out_w * channels;
      Ahead<T> ahead = next_rows(in, tile, h, gather_.in_w == gather_.out_w ? row : nullptr);
      for_blocks(
          in, tile, 0, [&](auto block, const auto& pixels, const Taps& taps, const Sweep& sweep, const Span& span) {
            const T* grads[block.kOutputs];
            for (int r = 0; r < block.kOutputs; ++r)
              grads[r] = r >= span.done && (sweep.blocks > 1 || r < span.count) ? row + (span.first + r) * channels
                                                                                : zeros_.data();
            correlate(block, pixels, taps, grads, sums, vector, bias_tap, sweep, ahead);
          });
    }
  }

  void flush(float*, int, int64_t) {}  // nothing is kept back

 private:
  // Outputs of a sweep: the first one, those of the last block that exist, and those of the first that blocks before it
  // have made: the last block of a row is moved back over its neighbour.
  struct Span {
    int64_t first;
    int count, done;
  };

  // Covers a row of outputs: calls f(block, pixels, taps, sweep, span). Blocks that read inside the image only follow
  // each other in one sweep.
  template <class F>
  void for_blocks(const T* in, const Tile& tile, size_t phase, F&& f) {
    const Axis& axis = gather_.horizontal[phase];
    const Taps taps = taps_.taps(phase);
    const int64_t channels = lanes_.channels, count = axis.count;
    const int64_t phases = int64_t(gather_.horizontal.size());
    Sweep sweep{1, 0, 0, tile.first_vector, tile.last_vector, lanes_.last()};
    // Calls by(width, g) for blocks from output `start` on, of which the first `done` were made before.
    const auto run = [&](const Taps& some, int64_t start, int64_t blocks, int width, int64_t done, auto&& by) {
      sweep.blocks = blocks;
      sweep.block_input = width * axis.step * channels;
      sweep.block_output = width * phases * channels;
      const Lines<T> pixels = lines(in, tile.image, phase, start);
      by(width, [&](auto block) { f(block, pixels, some, sweep, Span{start, block.kOutputs, int(done)}); });
    };
    const auto by_whole = [&](int width, auto&& g) { by_edge_block<Edge::both>(taps, width, g); };
    const auto by_left = [&](int width, auto&& g) { by_edge_block<Edge::left>(taps, width, g); };
    const auto by_right = [&](int width, auto&& g) { by_edge_block<Edge::right>(taps, width, g); };
    const auto by_taps = [&](int width, auto&& g) { by_block(taps, width, g); };
    const auto singly = [&](int width, auto&& g) { by_single_taps(width, g); };

    if (taps_.whole_row(phase)) return run(taps, 0, 1, int(count), 0, by_whole);
    const bool centred = taps_.centred(phase), single = goes_singly(taps);
    const int half = taps.columns / 2;
    const auto by_left_of_2 = [&](int width, auto&& g) { by_edge_block<Edge::left, 2>(taps, width, g); };
    const bool left_of_2 = !single && phases == 1 && taps.step == 2 && axis.offset.front() == -half;
    const int width = left_of_2 && count == 2 ? 2 : block_width(count);
    for (int64_t o = 0; o < count;) {
      const int64_t start = std::max<int64_t>(0, std::min(o, count - width));
      int64_t end = o;
      while (!single && inside(axis, end, width)) end += width;
      if (end > o) {
        run(taps, o, (end - o) / width, width, 0, by_taps);
        o = end;
      } else if (!single && inside(axis, start, width)) {
        run(taps, start, 1, width, o - start, by_taps);
        o = start + width;
      } else if (centred && start == 0 && width + half <= count) {
        run(taps, 0, 1, width, 0, by_left);
        o = width;
      } else if (centred && start + width == count && start >= half) {
        run(taps, start, 1, width, o - start, by_right);
        o = count;
      } else if (left_of_2 && o == 0 && ends_inside(axis, 0, width)) {
        run(taps, 0, 1, width, 0, by_left_of_2);
        o = width;
      } else if (!single && taps.step == 1) {
        const Table<T> pixels = table(in, tile.image, phase, o, width);
        sweep.blocks = 1;
        by_block(taps, width, [&](auto block) {
          f(block, pixels, taps, sweep, Span{o, int(std::min<int64_t>(width, count - o)), 0});
        });
        o += width;
      } else {  // with only those taps that lie inside, as far as they are the same
        const Stretch s = stretch(axis, o);
        Taps some = taps;
        some.columns = s.taps;
        some.column += s.first_tap;
        some.at_column += s.first_tap;
        const int64_t size = s.end - o;
        const int fitting = block_width(size) <= size ? block_width(size) : size > 1 ? 2 : 1;
        if (const int64_t blocks = size / fitting) run(some, o, blocks, fitting, 0, singly);
        if (size % fitting) run(some, s.end - fitting, 1, fitting, fitting - size % fitting, singly);
        o = s.end;
      }
    }
  }

  // Outputs from `o` to `end` whose taps inside the image are the same ones.
  struct Stretch {
    int64_t end;
    int first_tap, taps;
  };
  Stretch stretch(const Axis& axis, int64_t o) const {
    const auto taps_inside = [&](int64_t output) {
      const auto& at = axis.offset;
      const auto first = std::lower_bound(at.begin(), at.end(), -output * axis.step);
      const auto last = std::lower_bound(first, at.end(), gather_.in_w - output * axis.step);
      return std::pair(int(first - at.begin()), int(last - first));
    };
    const auto [first, count] = taps_inside(o);
    int64_t end = o + 1;
    while (end < axis.count && taps_inside(end) == std::pair(first, count)) ++end;
    return {end, first, count};
  }

  // What is new to this row of outputs, some way ahead of its blocks, and then to the one below, and the same of an
  // image whose row `beside` is read at the same time, or null. Past the image's last row the next image begins. So far
  // ahead that memory answers in time, yet not so far that the first-level cache has thrown it out again.
  Ahead<T> next_rows(const T* images, const Tile& tile, int64_t h, const T* beside = nullptr) const {
    constexpr int64_t lead = (int64_t(16) << 10) / sizeof(T);
    const int64_t phases = int64_t(gather_.vertical.size()), channels = lanes_.channels;
    const Axis& axis = gather_.vertical[h % phases];
    if (!axis.taps()) return {nullptr, 1, 0};
    const int64_t row = gather_.in_w * channels, run = (tile.last_vector - tile.first_vector) * kLanes;
    const int64_t newest = std::max<int64_t>(0, h / phases * axis.step + axis.offset.back() + 1 - axis.step);
    const T* first = images + (tile.image * gather_.in_h + newest) * row + tile.first_vector * kLanes;
    const T* also = axis.step > 1 ? first + row : beside ? beside + tile.first_vector * kLanes : nullptr;
    const int64_t pitch = axis.step * row;
    if (run >= channels && row > lead) return {first, row, pitch, lead, also};
    if (also) also += pitch;
    return {first + pitch, run < channels ? run : row, run < channels ? channels : pitch, 0, also};
  }

  // Whether `width` outputs from `first` on exist and read no column outside the image.
  bool inside(const Axis& axis, int64_t first, int width) const {
    return axis.taps() && first * axis.step + axis.offset.front() >= 0 && ends_inside(axis, first, width);
  }
  bool ends_inside(const Axis& axis, int64_t first, int width) const {
    return first + width <= axis.count && (first + width - 1) * axis.step + axis.offset.back() < gather_.in_w;
  }

  const T* pixel_row(const T* images, int64_t image, int i) const {
    return images + (image * gather_.in_h + taps_.in_row(i)) * gather_.in_w * lanes_.channels;
  }

  Lines<T> lines(const T* images, int64_t image, size_t phase, int64_t output) {
    pixels_.clear();
    for (int i = 0; i < taps_.rows(); ++i)
      pixels_.push_back(pixel_row(images, image, i) + taps_.first_column(phase, output) * lanes_.channels);
    return {pixels_.data(), lanes_.channels};
  }

  Table<T> table(const T* images, int64_t image, size_t phase, int64_t output, int width) {
    const int64_t first = taps_.first_column(phase, output);
    const int columns = taps_.columns(phase, width);
    pixels_.clear();
    for (int i = 0; i < taps_.rows(); ++i) {
      const T* row = pixel_row(images, image, i);
      for (int64_t column = first; column < first + columns; ++column)
        pixels_.push_back(column >= 0 && column < gather_.in_w ? row + column * lanes_.channels : zeros_.data());
    }
    return {pixels_.data(), columns};
  }

  const Gather& gather_;
  RowTaps taps_;
  const Lanes lanes_;
  std::vector<T> zeros_;
  std::vector<const T*> pixels_;
};

}  // namespace rkl::cpu::RKL_ISA
