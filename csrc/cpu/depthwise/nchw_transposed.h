// NCHW images, and NHWC images with less than a vector of channels. Some planes (of several images, where an image has
// few channels) are transposed to NHWC in a scratch image in the cache. There the windows for NHWC images serve them.
#pragma once
#include "cpu/depthwise/filter_window.h"
#include "cpu/simd/scratch.h"
#include "cpu/simd/transpose.h"

namespace rkl::cpu::RKL_ISA {

// Channels in memory: `count` planes of `pixels` pixels or, in NHWC, pixels with all channels of `images` images.
template <class T>
struct Planes {
  T* first;
  int64_t count;
  bool nhwc;
  int64_t pixels, channels, images;
};

// Rows of planes as an NHWC image, whose channels fill whole vectors.
template <class T>
class ScratchImage {
 public:
  // Makes room for rows [first, last), and returns the image as if it had all rows.
  Image<T> resize(int64_t first, int64_t last, int64_t width, int64_t channels) {
    const int64_t row = width * channels, size = (last - first) * row + kLanes;
    if (size > size_) storage_ = Scratch(size * int64_t(sizeof(T))), size_ = size;
    return {data() - first * row, row, channels};
  }

  // Copies rows [first, last) of planes into the scratch image.
  Image<T> fill(const Planes<const T>& planes, int64_t width, int64_t first, int64_t last, int64_t channels) {
    const Image<T> image = resize(first, last, width, channels);
    const int64_t begin = first * width, end = last * width;
    if (planes.nhwc) {
      pack(planes, begin, end);
      return image;
    }
    // Where images share a vector, the last vector may lack some. Their lanes count among its sums, so they are zeros.
    if (planes.count < kLanes) std::fill_n(data(), (end - begin) * channels, T{});
    planes_to_rows<T>(planes.first + begin, planes.pixels, data(), channels, planes.count, end - begin);
    return image;
  }

  // Copies rows [first, last) back to planes.
  void empty_into(const Planes<T>& planes, int64_t width, int64_t first, int64_t last, int64_t channels) const {
    const int64_t begin = first * width, end = last * width;
    if (planes.nhwc) return unpack(planes, begin, end);
    rows_to_planes<T>(data(), channels, planes.first + begin, planes.pixels, planes.count, end - begin);
  }

 private:
  T* data() const { return storage_.template as<T>(); }

  // Packs NHWC pixels: the channels of all images in one vector. Each store writes a whole vector; the next store
  // covers the zeros behind an image's channels, or there is room. Behind an image's rows there is none for unpack().
  void pack(const Planes<const T>& planes, int64_t begin, int64_t end) {
    const auto [first, count, nhwc, pixels, channels, images] = planes;
    T* to = data();
    for (int64_t pixel = begin; pixel < end; ++pixel, to += kLanes)
      for (int64_t i = 0; i < images; ++i)
        store(to + i * channels, load_some(first + (i * pixels + pixel) * channels, channels));
  }
  void unpack(const Planes<T>& planes, int64_t begin, int64_t end) const {
    const auto [first, count, nhwc, pixels, channels, images] = planes;
    for (int64_t i = 0; i < images; ++i) {
      const T* from = data() + i * channels;
      T* to = first + (i * pixels + begin) * channels;
      for (int64_t left = (end - begin) * channels; left > 0; left -= channels, from += kLanes, to += channels)
        store_up_to(to, load(from), left >= kLanes ? kLanes : channels);
    }
  }

  Scratch storage_;
  int64_t size_ = 0;
};

// The scratch images of one thread.
template <class T>
class PlaneScratch {
 public:
  // A task takes whole planes, of as many vectors (in even parts) as fit into the cache with their input. If too few
  // fit, it takes bands of rows of the fewest vectors. There are at least 8 tasks where there are rows enough.
  static Tiling tiling(const Conv2d& g, const Lanes& lanes, int64_t pairs) {
    constexpr int64_t kTogether = Pixels<T>::kTogether, kTasks = 8;
    const int64_t images = ceil_div(g.batch, lanes.images()), vectors = lanes.vectors();
    const int64_t vector = kLanes * int64_t(sizeof(T)), in_row = g.in_w * vector, out_row = g.out_w * vector;
    const int64_t whole = cache_share() / 2 / (g.in_h * in_row + g.out_h * out_row);
    const int64_t most = std::max(std::min(whole, images * vectors / kTasks), kTogether);
    const int64_t parts = ceil_div(vectors, most);
    const int64_t group = ceil_div(ceil_div(vectors, parts), kTogether) * kTogether;
    const int64_t halo = int64_t(g.kernel_h - 1) * g.dilation_h * in_row;
    const int64_t fitting = (cache_share() / group - halo) / (g.stride_h * in_row + out_row);
    const int64_t parallel = g.out_h * images * parts / kTasks;
    const int64_t rows = std::min(std::max<int64_t>(fitting, g.kernel_h), std::max<int64_t>(parallel, g.kernel_h));
    return {images, vectors, group, pairs, std::clamp<int64_t>(rows * pairs / std::max<int64_t>(1, g.out_h), 1, pairs)};
  }

 protected:
  PlaneScratch(const Gather& gather, const Lanes& lanes, const Conv2d& g)
      : gather_(gather), lanes_(lanes), batch_(g.batch), nhwc_(g.nhwc) {}

  // The planes of a tile, from its first vector's first channel on.
  template <class U>
  Planes<U> planes(U* images, const Tile& tile, int64_t pixels) const {
    const int64_t image = tile.image * lanes_.images(), first = lanes_.at(tile.first_vector);
    const int64_t here = std::min(lanes_.images(), batch_ - image), channels = lanes_.channels;
    const int64_t count = std::min(here * channels - first, tile.last_vector * kLanes - first);
    return {images + (image * channels + first) * pixels, count, nhwc_, pixels, channels, here};
  }

  // The channels of a tile's scratch image: whole vectors.
  int64_t channels(const Tile& tile) const {
    const int64_t first = lanes_.at(tile.first_vector), last = lanes_.at(tile.last_vector - 1) + kLanes;
    return ceil_div(last - first, kLanes) * kLanes;
  }

  // Copies rows [first, last) of a tile's planes into a scratch image, and returns it as if it had all channels.
  Image<const T> copied(ScratchImage<T>& scratch, const T* images, const Tile& tile, int64_t height, int64_t width,
                        int64_t first, int64_t last) const {
    const Image<T> image = scratch.fill(planes(images, tile, height * width), width, first, last, channels(tile));
    return {image.first - lanes_.at(tile.first_vector), image.row, image.pixel};
  }

  // Copies the input rows that output rows [begin, end) read.
  Image<const T> read(const T* in, const Tile& tile, int64_t begin, int64_t end) {
    const int64_t phases = int64_t(gather_.vertical.size());
    int64_t first = gather_.in_h, last = 0;
    for (const Axis& axis : gather_.vertical) {
      if (!axis.taps) continue;
      first = std::min(first, begin / phases * axis.step + axis.offset);
      last = std::max(last, (end - 1) / phases * axis.step + axis.offset + (axis.taps - 1) * axis.distance + 1);
    }
    first = std::max<int64_t>(first, 0);
    last = std::max(first, std::min(last, gather_.in_h));
    return copied(image_in_, in, tile, gather_.in_h, gather_.in_w, first, last);
  }

  const Gather& gather_;
  const Lanes lanes_;
  const int64_t batch_;
  const bool nhwc_;
  ScratchImage<T> image_in_, image_out_;
};

template <class T>
class PlaneFilterRows : PlaneScratch<T>, public FilterRows<T> {
 public:
  PlaneFilterRows(const Gather& gather, const Conv2d& g, const Lanes& lanes, bool wants_bias)
      : PlaneScratch<T>(gather, lanes, g),
        FilterRows<T>(gather, g, lanes, wants_bias, std::max(g.in_w, g.out_w) * lanes.vectors() * kLanes) {}

  int64_t height() const { return this->pairs(); }

  // Adds the tile's pairs of rows of the output's gradient to the filter's gradient.
  void correlate_rows(const T* in, const T* grad, float* sums, const Tile& tile) {
    const int64_t height = this->gather_.out_h, width = this->gather_.out_w;
    const int64_t begin = this->rows_before(tile.first_row);
    const int64_t end = std::min(height, this->rows_before(tile.last_row));
    const Image<const T> image = this->read(in, tile, begin, end);
    const Image<const T> gradient = this->copied(this->image_out_, grad, tile, height, width, begin, end);
    for (int64_t i = 0; i < this->lattices(); ++i)
      for (int64_t pair = tile.first_row; pair < tile.last_row; ++pair)
        this->add(image, gradient, sums, i * this->pairs() + pair, tile);
  }
};

template <class T>
class PlaneRows : PlaneScratch<T> {
  static constexpr int kRows = Pixels<T>::kRows;

 public:
  using Filter = PlaneFilterRows<T>;
  using Operand = T;
  using PlaneScratch<T>::tiling;

  PlaneRows(const Gather& gather, const Conv2d& g, const Lanes& lanes, const Finish& finish)
      : PlaneScratch<T>(gather, lanes, g), rows_(gather, lanes, finish, gather.in_w * lanes.vectors() * kLanes) {}

  // Pairs of rows that interleave are made together.
  int64_t height() const { return rows_.pairs() / kRows; }

  // Makes a tile's rows of the output.
  void convolve_rows(const T* in, T* out, const Tile& tile) {
    const int64_t first = tile.first_row * kRows, last = tile.last_row * kRows, begin = rows_.rows_before(first);
    const int64_t height = this->gather_.out_h, width = this->gather_.out_w, channels = this->channels(tile);
    const int64_t end = std::min(height, rows_.rows_before(last));
    const Image<const T> from = this->read(in, tile, begin, end);
    Image<T> to = this->image_out_.resize(begin, end, width, channels);
    to.first -= this->lanes_.at(tile.first_vector);
    for (int64_t i = 0; i < rows_.classes(); ++i)
      for (int64_t pair = first; pair < last; ++pair) rows_.make(from, to, i * rows_.pairs() + pair, tile);
    this->image_out_.empty_into(this->planes(out, tile, height * width), width, begin, end, channels);
  }

 private:
  WindowRows<T> rows_;
};

}  // namespace rkl::cpu::RKL_ISA
