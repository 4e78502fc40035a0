// Images whose channels lie apart, and NHWC images with less than a vector of channels: kLanes planes, of several
// images where they have few, go through a scratch image in the cache, where they are transposed to one NHWC image of
// kLanes channels, and so meet the same windows as NHWC images. The transposition costs about as much as a 3 x 3 filter
// and wastes nothing on narrow maps.
#pragma once
#include "cpu/depthwise/filter_window.h"
#include "cpu/depthwise/tiling.h"
#include "cpu/simd/transpose.h"

namespace rkl::cpu::RKL_ISA {

// Up to kLanes channels as they lie in memory: `count` planes of so many pixels, or pixels of all channels of some
// images.
template <class T>
struct Planes {
  T* first;
  int count;
  bool nhwc;
  int64_t pixels, channels, images;
};

// Rows of up to kLanes channels as an image of kLanes channels.
class ScratchImage {
 public:
  // Room for rows [first, last).
  void resize(int64_t first, int64_t last, int64_t width) {
    first_row_ = first;
    row_ = width * kLanes;
    const size_t floats = size_t((last - first) * row_) + (kLanes + 1) * kLanes;
    if (storage_.size() < floats) storage_.resize(floats);
    // Aligned, since vectors that lie across two lines cost two accesses.
    const uintptr_t address = reinterpret_cast<uintptr_t>(storage_.data()), line = 4 * kLanes;
    data_ = storage_.data() + (line - address % line) % line / sizeof(float);
  }

  Image<float> image() { return {data_ - first_row_ * row_, row_, kLanes}; }
  Image<const float> image() const { return {data_ - first_row_ * row_, row_, kLanes}; }

  // Takes rows [first, last).
  template <class T>
  void fill(const Planes<const T>& planes, int64_t width, int64_t first, int64_t last) {
    resize(first, last, width);
    if (planes.nhwc) return pack(planes, first * width, last * width);
    for_chunks(first * width, last * width, [&](int64_t pixel, int64_t some) {
      Vec v[kLanes];
      take(planes, pixel, some, last * width, v);
      float* to = data_ + (pixel - first * width) * kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i >= some) break;
        store(to + i * kLanes, v[i]);
      }
    });
  }

  // Gives rows [first, last) of an image.
  template <class T>
  void empty_into(const Planes<T>& planes, int64_t width, int64_t first, int64_t last) {
    if (planes.nhwc) return unpack(planes, first * width, last * width);
    for_chunks(first * width, last * width, [&](int64_t pixel, int64_t some) {
      const float* from = data_ + (pixel - first * width) * kLanes;
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = load(from + i * kLanes);  // past `some` there is room, and no meaning
      give(planes, pixel, some, v);
    });
  }

 private:
  // Pixels by which the planes are asked for ahead of time: there are more of them than the hardware follows.
  static constexpr int kAhead = 4 * kLanes;

  // f(pixel, count) for runs of kLanes pixels that cover [begin, end). The last is moved back over its neighbour: only
  // where there are fewer pixels than lanes is a run shorter.
  template <class F>
  static void for_chunks(int64_t begin, int64_t end, F&& f) {
    for (int64_t pixel = begin; pixel < end; pixel += kLanes) {
      const int64_t start = std::max(begin, std::min(pixel, end - kLanes));
      f(start, std::min<int64_t>(kLanes, end - start));
    }
  }

  // Pixels whose channels lie together, those of all images in one vector. Vectors are stored whole, image by image of
  // a pixel: what one has too much, zeros, the next one covers, or there is room. Behind an image's rows there is none.
  template <class T>
  void pack(const Planes<const T>& planes, int64_t begin, int64_t end) {
    const auto [first, count, nhwc, pixels, channels, images] = planes;
    float* to = data_;
    for (int64_t pixel = begin; pixel < end; ++pixel, to += kLanes)
      for (int64_t i = 0; i < images; ++i)
        store(to + i * channels, load_some(first + (i * pixels + pixel) * channels, channels));
  }
  template <class T>
  void unpack(const Planes<T>& planes, int64_t begin, int64_t end) const {
    const auto [first, count, nhwc, pixels, channels, images] = planes;
    for (int64_t i = 0; i < images; ++i) {
      const float* from = data_ + i * channels;
      T* to = first + (i * pixels + begin) * channels;
      for (int64_t left = (end - begin) * channels; left > 0; left -= channels, from += kLanes, to += channels)
        left >= kLanes ? store(to, load(from)) : store_some(to, load(from), channels);
    }
  }

  // `some` pixels of the planes, one a vector.
  template <class T>
  static void take(const Planes<const T>& planes, int64_t pixel, int64_t some, int64_t end, Vec (&v)[kLanes]) {
    const T* from = planes.first + pixel;
    if (planes.count == kLanes && some == kLanes) {
      // Where these planes end, the next ones follow.
      const int64_t ahead = pixel + kAhead < end ? kAhead : kAhead + (kLanes - 1) * planes.pixels;
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        __builtin_prefetch(from + lane * planes.pixels + ahead);
        v[lane] = load(from + lane * planes.pixels);
      }
    } else {
      for (int lane = 0; lane < kLanes; ++lane)
        v[lane] = lane < planes.count ? load_some(from + lane * planes.pixels, some) : Vec{};
    }
    transpose(v);
  }

  template <class T>
  static void give(const Planes<T>& planes, int64_t pixel, int64_t some, Vec (&v)[kLanes]) {
    T* to = planes.first + pixel;
    transpose(v);
    if (planes.count < kLanes || some < kLanes) {
      for (int lane = 0; lane < planes.count; ++lane) store_some(to + lane * planes.pixels, v[lane], some);
    } else {
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) store(to + lane * planes.pixels, v[lane]);
    }
  }

  std::vector<float> storage_;
  float* data_ = nullptr;
  int64_t first_row_ = 0, row_ = 0;
};

// Their scratch images. One object a thread.
template <class T>
class PlaneScratch {
 public:
  // A vector of planes, in bands of pairs of rows that fit into the cache with their input; at least 8 tasks where
  // there are rows.
  static Tiling tiling(const Conv2d& g, const Lanes& lanes, int64_t pairs) {
    const int64_t images = ceil_div(g.batch, lanes.images());
    const int64_t vector = 4 * kLanes, in_row = g.in_w * vector, out_row = g.out_w * vector;
    const int64_t halo = int64_t(g.kernel_h - 1) * g.dilation_h * in_row;
    const int64_t fitting = (cache_share() - halo) / (g.stride_h * in_row + out_row);
    const int64_t parallel = g.out_h * images * lanes.vectors() / 8;
    const int64_t rows = std::min(std::max<int64_t>(fitting, g.kernel_h), std::max<int64_t>(parallel, g.kernel_h));
    return {images, lanes.vectors(), 1, pairs,
            std::clamp<int64_t>(rows * pairs / std::max<int64_t>(1, g.out_h), 1, pairs)};
  }

 protected:
  PlaneScratch(const Gather& gather, const Lanes& lanes, int64_t batch)
      : gather_(gather), lanes_(lanes), batch_(batch) {}

  template <class U>
  Planes<U> planes(U* images, const Tile& tile, int64_t pixels) const {
    const int64_t image = tile.image * lanes_.images(), first = tile.first_vector * kLanes;
    const int64_t here = std::min(lanes_.images(), batch_ - image), channels = lanes_.channels;
    const int count = int(std::min<int64_t>(kLanes, here * channels - first));
    return {images + (image * channels + first) * pixels, count, lanes_.nhwc, pixels, channels, here};
  }

  // The input rows that output rows [begin, end) read.
  void fill(const T* in, const Tile& tile, int64_t begin, int64_t end) {
    const int64_t phases = int64_t(gather_.vertical.size());
    int64_t first = gather_.in_h, last = 0;
    for (const Axis& axis : gather_.vertical) {
      if (!axis.taps()) continue;
      first = std::min(first, begin / phases * axis.step + axis.offset.front());
      last = std::max(last, (end - 1) / phases * axis.step + axis.offset.back() + 1);
    }
    first = std::max<int64_t>(first, 0);
    last = std::max(first, std::min(last, gather_.in_h));
    image_in_.fill(planes(in, tile, gather_.in_h * gather_.in_w), gather_.in_w, first, last);
  }

  const Gather& gather_;
  const Lanes lanes_;
  const int64_t batch_;
  ScratchImage image_in_, image_out_;
};

template <class T>
class PlaneFilterRows : PlaneScratch<T> {
 public:
  PlaneFilterRows(const Gather& gather, const Conv2d& g, const Lanes& lanes, bool wants_bias)
      : PlaneScratch<T>(gather, lanes, g.batch),
        wants_bias_(wants_bias),
        rows_(gather, lanes, g.kernel_h, g.kernel_w, std::max(g.in_w, g.out_w) * kLanes) {}

  int64_t height() const { return rows_.pairs(); }

  void begin(float* sums, const Tile& all) { rows_.begin(all.first_vector, all.last_vector, sums); }

  // Adds the tile's pairs of rows of the output's gradient to the filter's gradient.
  void correlate_rows(const T* in, const T* grad, float* sums, const Tile& tile) {
    const int64_t begin = rows_.rows_before(tile.first_row);
    const int64_t end = std::min(this->gather_.out_h, rows_.rows_before(tile.last_row));
    this->fill(in, tile, begin, end);
    this->image_out_.fill(this->planes(grad, tile, this->gather_.out_h * this->gather_.out_w), this->gather_.out_w,
                          begin, end);
    const Image<float> image = this->image_in_.image(), gradient = this->image_out_.image();
    for (int64_t pair = tile.first_row; pair < tile.last_row; ++pair)
      rows_.add({image.first, image.row, image.pixel}, {gradient.first, gradient.row, gradient.pixel}, pair,
                tile.first_vector, tile.last_vector, wants_bias_, sums);
  }

  void finish(float* sums, const Tile& all) const { rows_.finish(all.first_vector, all.last_vector, sums); }

 private:
  const bool wants_bias_;
  FilterRows<float> rows_;
};

template <class T>
class PlaneRows : PlaneScratch<T> {
 public:
  using Filter = PlaneFilterRows<T>;
  using Operand = float;
  using PlaneScratch<T>::tiling;

  static std::vector<float> pack(const T* filter, const Gather& gather, const Conv2d& g, const Lanes& lanes) {
    return pack_weights<float>(filter, gather, g.kernel_h, g.kernel_w, lanes);
  }

  PlaneRows(const Gather& gather, const Conv2d& g, const Lanes& lanes, const Finish& finish)
      : PlaneScratch<T>(gather, lanes, g.batch),
        rows_(gather, lanes, finish.weights, finish.bias, finish.act, gather.in_w * kLanes) {}

  int64_t height() const { return rows_.pairs(); }

  // The tile's pairs of rows of the output.
  void convolve_rows(const T* in, T* out, const Tile& tile) {
    const int64_t begin = rows_.rows_before(tile.first_row);
    const int64_t end = std::min(this->gather_.out_h, rows_.rows_before(tile.last_row));
    this->fill(in, tile, begin, end);
    this->image_out_.resize(begin, end, this->gather_.out_w);
    const Image<float> image = this->image_in_.image();
    for (int64_t pair = tile.first_row; pair < tile.last_row; ++pair)
      rows_.make({image.first, image.row, image.pixel}, this->image_out_.image(), pair, tile.first_vector,
                 tile.last_vector, false);
    this->image_out_.empty_into(this->planes(out, tile, this->gather_.out_h * this->gather_.out_w), this->gather_.out_w,
                                begin, end);
  }

 private:
  WindowRows<float> rows_;
};

}  // namespace rkl::cpu::RKL_ISA
