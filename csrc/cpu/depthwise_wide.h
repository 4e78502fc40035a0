// Rows of NCHW images at stride 1, with vectors along the rows: the blocks of NHWC turned on their side. A block is R
// neighbouring rows of one plane; where NHWC reads a pixel once for up to K outputs beside each other, this reads a
// vector of pixels once for up to K outputs below each other, with one weight for all lanes. Planes pass through a
// scratch image in the cache: that pads them, and widens 16 bits to floats once.
#pragma once
#include "cpu/depthwise_rows.h"
#include "cpu/transpose.h"

namespace rkl::cpu::RKL_ISA {

inline int64_t in_whole_vectors(int64_t elements) { return (elements + kLanes - 1) / kLanes * kLanes; }

// Whether the filter is 3 x 3 with one pixel of padding, at this stride, on NCHW images: what is taken as it lies.
inline bool is_3_by_3_on_planes(const Conv2d& g, int stride) {
  const bool one_around = g.padding_h == 1 && g.padding_w == 1 && g.dilation_h == 1 && g.dilation_w == 1;
  return !g.nhwc && one_around && g.stride_h == stride && g.stride_w == stride && g.kernel_h == 3 && g.kernel_w == 3;
}

// bias + the nine pixels times the nine weights, row by row. A sum for each row: one after the other, the nine would
// wait for each other.
template <class T>
RKL_INLINE Vec sum_3_by_3(Vec bias, const Vec (&x)[9], const Vec (&weight)[9], T) {
  Vec row[3] = {bias, Vec{}, Vec{}};
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) row[i / 3] = multiply_add(row[i / 3], x[i], weight[i], T{});
  return row[0] + (row[1] + row[2]);
}

// Some rows of a plane as floats, with zeros around them. What lies beside the rows is zero from the start and is never
// written; rows outside the plane are made zero.
class ScratchLines {
 public:
  // columns: [-left, end) are to be read.
  ScratchLines(int64_t width, int64_t left, int64_t end)
      : width_(width),
        left_(in_whole_vectors(left)),  // so that rows are written by whole lines
        pitch_(left_ + in_whole_vectors(std::max(end, width))) {}

  int64_t pitch() const { return pitch_; }
  const float* at(int64_t row, int64_t column) const { return data_ + row * pitch_ + left_ + column; }

  // Rows [first, first + count) of a plane of `height` rows, of which those from `end` on are taken for zeros.
  template <class T>
  void fill(const T* plane, int64_t height, int64_t first, int64_t end, int64_t count) {
    const size_t floats = (count + 1) * pitch_ + kLanes;  // a vector may start in the last columns
    if (lines_.size() < floats) {
      lines_.assign(floats, 0.f);
      const uintptr_t address = reinterpret_cast<uintptr_t>(lines_.data()), line = 4 * kLanes;
      data_ = lines_.data() + (line - address % line) % line / sizeof(float);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i;
      float* to = data_ + i * pitch_ + left_;
      if (row >= 0 && row < std::min(height, end))
        take(plane + row * width_, to);
      else
        std::fill(to, to + width_, 0.f);
    }
  }

 private:
  template <class T>
  void take(const T* row, float* to) const {
    if (width_ < kLanes) return store(to, load_some(row, width_));
    for (int64_t column = 0; column < width_; column += kLanes) {
      const int64_t from = std::min(column, width_ - kLanes);
      store(to + from, load(row + from));
    }
  }

  int64_t width_, left_, pitch_;
  std::vector<float> lines_;
  float* data_ = nullptr;
};

template <class T>
class WideRows {
 public:
  // Of narrower rows too many lanes would be idle.
  static bool serves(const Conv2d& g) {
    return !g.nhwc && g.stride_h == 1 && g.stride_w == 1 && std::min(g.in_w, g.out_w) > kLanes / 2;
  }

  // Bands that fit into a first-level cache; small planes of some channels together, so that each task has work.
  static Tiling tiling(const Conv2d& g, const Lanes&) {
    const int64_t rows = kBandFloats / in_whole_vectors(g.in_w) - int64_t(g.kernel_h - 1) * g.dilation_h;
    const int64_t band = std::clamp<int64_t>(rows, std::min<int64_t>(g.out_h, 2 * g.kernel_h), g.out_h);
    const int64_t group = std::clamp<int64_t>(kBandFloats / (g.out_h * g.out_w), 1, std::min<int64_t>(16, g.channels));
    return {g.batch, g.channels, group, g.out_h, band};
  }

  WideRows(const Gather& gather, const Conv2d& g, const Lanes& lanes)
      : gather_(gather),
        lanes_(lanes),
        kernel_size_(g.kernel_h * g.kernel_w),
        across_(gather.horizontal[0]),
        down_(gather.vertical[0]),
        in_(gather.in_w, std::max<int64_t>(0, -across_.offset.front()),
            in_whole_vectors(gather.out_w) + std::max<int64_t>(0, across_.offset.back())),
        grad_(gather.out_w, 0, 0) {
    for (int t = 0; t < down_.taps(); ++t) {
      tap_.push_back(down_.tap[t] * g.kernel_w);
      at_.push_back(down_.offset[t] - down_.offset.front());
    }
  }

  // The tile's rows of the output, of all of the tile's channels.
  void convolve_rows(const T* in, const Finish& finish, T* out, const Tile& tile) {
    const int64_t width = gather_.out_w;
    for (int64_t channel = tile.first_vector; channel < tile.last_vector; ++channel) {
      const Rows rows = fill(in, tile, channel);
      Ahead<T> ahead = next_rows(in, tile, channel);
      T* to = out + (plane(tile, channel) * gather_.out_h + tile.first_row) * width;
      // Only rows of whole vectors can be streamed as they are made. Others are put together in the cache first.
      const bool staged = finish.past_caches && width > kLanes && (width % kLanes || !aligned_for_stream(to));
      const int64_t at_once = staged ? 1 : rows.blocks, pixels = rows.block * width;
      if (staged && staged_.size() < size_t(rows.blocks * pixels)) staged_.resize(rows.blocks * pixels);
      const PlaneFilter filter{finish.weights + at(channel, 0, kernel_size_), finish.bias + channel};
      const Sweep sweep{at_once, rows.block * in_.pitch(),      pixels,
                        0,       (width + kLanes - 1) / kLanes, std::max<int64_t>(0, width - kLanes)};
      int64_t written = 0;
      for (int64_t b = 0; b < rows.blocks; b += at_once) {
        const int in_last = b + at_once == rows.blocks ? rows.in_last_block : rows.block;
        const Outputs<T> outputs{(staged ? staged_.data() : to) + b * pixels,
                                 width,
                                 rows.block,
                                 in_last,
                                 finish.act,
                                 finish.past_caches && !staged && width >= kLanes,
                                 int(std::min<int64_t>(width, kLanes))};
        by_block(taps(), rows.block,
                 [&](auto block) { convolve(block, lines(b * rows.block), taps(), filter, sweep, outputs, ahead); });
        if (staged) written = copy_out(to, written, (b * rows.block + in_last) * width);
      }
      if (staged)
        std::copy(staged_.data() + written, staged_.data() + (tile.last_row - tile.first_row) * width, to + written);
    }
  }

  // Adds the tile's rows of the output's gradient to the filter's gradient, of which flush() gives the sums.
  void correlate_rows(const T* in, const T* grad, float*, int bias_tap, const Tile& tile) {
    const int64_t size = (bias_tap + 1) * kLanes;
    sums_.resize((tile.last_vector - tile.first_vector) * size);
    for (int64_t channel = tile.first_vector; channel < tile.last_vector; ++channel) {
      const Rows rows = fill(in, tile, channel);
      Ahead<T> ahead = next_rows(in, tile, channel);
      grad_.fill(grad + plane(tile, channel) * gather_.out_h * gather_.out_w, gather_.out_h, tile.first_row,
                 tile.last_row, rows.blocks * rows.block);
      const float* grads[8];
      for (int r = 0; r < rows.block; ++r) grads[r] = grad_.at(r, 0);
      const Sweep sweep{
          rows.blocks, rows.block * in_.pitch(), rows.block * grad_.pitch(), 0, (gather_.out_w + kLanes - 1) / kLanes,
          INT64_MAX};
      float* sums = sums_.data() + (channel - tile.first_vector) * size;
      by_block(taps(), rows.block,
               [&](auto block) { correlate(block, lines(), taps(), grads, sums, 0, bias_tap, sweep, ahead); });
    }
  }

  // Adds what correlate_rows has summed of the channels from `first` on to sums (vector, tap, lane), and begins anew.
  void flush(float* sums, int bias_tap, int64_t first) {
    const int64_t rows = bias_tap + 1;
    sum_lanes(sums_.data(), sums_.size() / kLanes,
              [&](int64_t i, float sum) { sums[at(first + i / rows, i % rows, rows)] += sum; });
    sums_.clear();
  }

  // Of a channel's tap among weights or sums.
  static int64_t at(int64_t channel, int64_t tap, int64_t taps) {
    return Lanes::at(channel / kLanes, tap, taps) + channel % kLanes;
  }

 private:
  static constexpr int64_t kBandFloats = 8192;

  struct Rows {  // in blocks of so many, of which the last may be short
    int block;
    int64_t blocks;
    int in_last_block;
  };

  int64_t plane(const Tile& tile, int64_t channel) const { return tile.image * lanes_.channels + channel; }

  // The input rows that the tile's output rows read.
  Rows fill(const T* in, const Tile& tile, int64_t channel) {
    const int64_t rows = tile.last_row - tile.first_row;
    const int block = block_width(rows);
    const int64_t blocks = (rows + block - 1) / block, first = tile.first_row + down_.offset.front();
    in_.fill(in + plane(tile, channel) * gather_.in_h * gather_.in_w, gather_.in_h, first,
             tile.last_row + down_.offset.back(), blocks * block + at_.back());
    return {block, blocks, int(rows - (blocks - 1) * block)};
  }

  // What is read next: the rows below, or the next plane. While a block computes nothing else is asked of the memory.
  Ahead<T> next_rows(const T* in, const Tile& tile, int64_t channel) const {
    const int64_t row = std::clamp<int64_t>(tile.last_row + down_.offset.back(), 0, gather_.in_h);
    return {in + (plane(tile, channel) * gather_.in_h + row) * gather_.in_w, INT64_MAX, 0};
  }

  // Columns of the filter stand for rows, and rows for columns.
  Taps taps() const {
    return {across_.taps(), down_.taps(), 1, across_.tap.data(), tap_.data(), at_.data(), down_.consecutive()};
  }
  Lines<float> lines(int64_t first_row = 0) {
    pixels_.clear();
    for (const int64_t offset : across_.offset) pixels_.push_back(in_.at(first_row, offset));
    return {pixels_.data(), in_.pitch()};
  }

  // Streams what is staged of [first, end), as far as it fills vectors; where it stopped.
  int64_t copy_out(T* to, int64_t first, int64_t end) const {
    for (; first < end && !aligned_for_stream(to + first); ++first) to[first] = staged_[first];
    for (; first + kLanes <= end; first += kLanes)
      write_past_caches(to + first, read<decltype(packed(Vec{}, T{}))>(staged_.data() + first));
    return first;
  }

  const Gather& gather_;
  const Lanes lanes_;
  const int kernel_size_;
  const Axis &across_, &down_;
  std::vector<int> tap_;
  std::vector<int64_t> at_;  // rows from the first tap's
  ScratchLines in_, grad_;
  std::vector<const float*> pixels_;
  std::vector<T> staged_;
  std::vector<float> sums_;  // (channel, tap, kLanes)
};

}  // namespace rkl::cpu::RKL_ISA
