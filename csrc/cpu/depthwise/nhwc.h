// Depthwise convolution of NHWC images whose channels fill vectors. Windows read and write the images in place.
#pragma once
#include "cpu/depthwise/filter_window.h"

namespace rkl::cpu::RKL_ISA {

template <class T>
Image<T> nhwc_image(T* images, Distance distance, int64_t image, int64_t height, int64_t width, int64_t channels) {
  return {images + image * height * width * channels, width * channels, channels, distance};
}

template <class T>
int64_t bytes_of(const Conv2d& g, int64_t height, int64_t width) {
  return g.batch * height * width * g.channels * int64_t(sizeof(T));
}

// What a pass for both gradients reads and writes.
template <class T>
int64_t bytes_of_gradients(const Conv2d& g) {
  return 2 * bytes_of<T>(g, g.in_h, g.in_w) + bytes_of<T>(g, g.out_h, g.out_w);
}

// The images as the kernels take them. Where neighbouring pixels of a row can count as channels, as many do as fill
// whole vectors (8 channels under 3 x 1 filled half of each).
template <class T>
Conv2d in_whole_vectors(Conv2d g) {
  const int64_t pixels = pixels_as_channels(g, Pixels<T>::kTogether * kLanes);
  g.channels *= pixels, g.in_w /= pixels, g.out_w /= pixels;
  return g;
}

// Whether outputs may be written past the caches: they are large, and windows store whole cache lines at once.
template <class T>
bool may_go_past_caches(int64_t pixels, int64_t channels, int64_t threads) {
  const int64_t pixel = channels * int64_t(sizeof(T));
  return kLineVectors<T> == Pixels<T>::kAtOnce && pixel % kLine == 0 && exceeds_caches(pixels * pixel, threads);
}

// How many strips of columns a row is cut into, so that what is in flight stays in a core's second-level cache: the
// input rows under two pairs of rows of outputs, the prefetched rows and, unless written past the caches, the output
// rows. A strip has at least 64 columns. (128 channels of 256 px in bf16, 3 x 7: 1.3 to 1.9 times as fast in two
// strips, Zen 5.) Tasks depend on the shape alone: hence the limit of several threads, whatever their number.
template <class T>
int64_t strips_of(const Conv2d& g) {
  const int64_t rows = 4 * Pixels<T>::kRows, read = g.kernel_h - 1 + rows * g.stride_h;
  const int64_t written = may_go_past_caches<T>(g.batch * g.out_h * g.out_w, g.channels, 2) ? 0 : rows;
  const int64_t bytes = (read * g.in_w + written * g.out_w) * g.channels * int64_t(sizeof(T));
  return std::clamp<int64_t>(ceil_div(bytes, cache_share()), 1, std::max<int64_t>(1, g.out_w / 64));
}

template <class T>
class NhwcFilterRows : public FilterRows<T> {
 public:
  NhwcFilterRows(const Gather& forward, const Conv2d& g, const Lanes& lanes, bool wants_bias)
      : FilterRows<T>(forward, g, lanes, wants_bias, std::max(g.in_w, g.out_w) * g.channels),
        g_(g),
        in_(distance_of(bytes_of<T>(g, g.in_h, g.in_w), bytes_of_gradients<T>(g))),
        grad_(distance_of(bytes_of<T>(g, g.out_h, g.out_w), bytes_of_gradients<T>(g))) {}

  int64_t height() const { return this->lattices() * this->pairs(); }

  void correlate_rows(const T* in, const T* grad, float* sums, const Tile& tile) {
    const auto image = nhwc_image(in, in_, tile.image, g_.in_h, g_.in_w, g_.channels);
    const auto gradient = nhwc_image(grad, grad_, tile.image, g_.out_h, g_.out_w, g_.channels);
    for (int64_t step = tile.first_row; step < tile.last_row; ++step) this->add(image, gradient, sums, step, tile);
  }

 private:
  const Conv2d& g_;
  const Distance in_, grad_;
};

// forward: makes outputs; else the image's gradient, in one pass with the filter's.
template <class T, bool forward>
class NhwcRows {
 public:
  using Filter = NhwcFilterRows<T>;
  using Operand = T;

  // Channels go in parts, so narrow that the rows under a filter, and the filter itself, stay in a core's cache, but
  // not so narrow that memory is read in short runs (33 px, 2048 channels, dilation 12: 28 ms in runs of 384 bytes, 20
  // ms in runs of 2 KiB; but 31 x 31: 23 ms for parts of 24 vectors, 17.7 ms for 4). Forward, there are some 32 tasks.
  static Tiling tiling(const Conv2d& g, const Lanes& lanes, int64_t pairs) {
    const int64_t vectors = lanes.vectors(), line = kLanes * int64_t(sizeof(T));
    const int64_t rows = (g.kernel_h + 1) * g.in_w * line;  // that a pair of rows of outputs spans
    const int64_t rows_fit = std::max<int64_t>(cache_share() / rows, 2048 / line);
    const int64_t filter = int64_t(operands<T>(g.kernel_h)) * g.kernel_w * kLanes * 4;
    const int64_t filter_fits = std::max<int64_t>((int64_t(256) << 10) / filter, 256 / line);
    const int64_t parts = ceil_div(vectors, std::min({rows_fit, filter_fits, vectors}));
    int64_t even = ceil_div(ceil_div(vectors, parts), Pixels<T>::kAtOnce) * Pixels<T>::kAtOnce;
    // No part is the last vector alone: it may overlap its neighbour, which two tasks would then activate in place.
    while (even < vectors && vectors % even == 1) even += Pixels<T>::kAtOnce;
    if (!forward) return {g.batch, vectors, even, pairs, 1};
    const int64_t bands = std::clamp<int64_t>(ceil_div(32, g.batch * parts), 1, pairs);
    return {g.batch, vectors, even, pairs, ceil_div(pairs, bands), strips_of<T>(g)};
  }

  NhwcRows(const Gather& gather, const Conv2d& g, const Lanes& lanes, const Finish& finish)
      : gather_(gather),
        channels_(lanes.channels),
        streams_(may_go_past_caches<T>(g.batch * gather.out_h * gather.out_w, channels_, finish.threads)),
        rows_(gather, lanes, finish, gather.in_w * lanes.channels, forward ? strips_of<T>(g) : 1,
              streams_ ? channels_ * int64_t(sizeof(T)) : 0) {
    const int64_t in = bytes_of<T>(g, gather.in_h, gather.in_w), out = bytes_of<T>(g, gather.out_h, gather.out_w);
    const int64_t read = std::max(in, finish.image_bytes), all = forward ? read + out : bytes_of_gradients<T>(g);
    in_ = distance_of(read, all);
    out_ = finish.image_bytes ? Distance::held : distance_of(out, all);
  }

  ~NhwcRows() {  // each thread has one object: this serves all its tiles
    if (streams_) end_stream();
  }

  int64_t height() const { return rows_.steps(); }

  void convolve_rows(const T* in, T* out, const Tile& tile) {
    const auto from = nhwc_image(in, in_, tile.image, gather_.in_h, gather_.in_w, channels_);
    auto to = nhwc_image(out, out_, tile.image, gather_.out_h, gather_.out_w, channels_);
    // Each thread asks once, of the middle of its first image: the allocator has written to the memory's first page.
    if (!asked_)
      streams_ = streams_ && rows_.stores_all_at_once() && in_whole_lines(out, channels_ * int64_t(sizeof(T))) &&
                 is_resident(to.first + to.row * gather_.out_h / 2);
    asked_ = true;
    to.streams = streams_;
    for (int64_t step = tile.first_row; step < tile.last_row; ++step) rows_.make(from, to, step, tile);
  }

 private:
  const Gather& gather_;
  const int64_t channels_;
  Distance in_, out_;
  bool streams_, asked_ = false;
  WindowRows<T> rows_;
};

}  // namespace rkl::cpu::RKL_ISA
