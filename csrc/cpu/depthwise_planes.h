// Rows of images whose channels lie apart and whose rows are too short, or strides too wide, for vectors along them
// (depthwise_wide.h), and of NHWC images with less than a vector of channels: kLanes planes go through a scratch image
// in the cache, where they are turned into one image of kLanes channels and padded with zeros, and so meet the same
// blocks as NHWC images. Turning costs about as much as a 3 x 3 filter and wastes nothing on narrow maps.
#pragma once
#include "cpu/depthwise_rows.h"
#include "cpu/transpose.h"

namespace rkl::cpu::RKL_ISA {

// Up to kLanes channels as they lie in memory: pixel p of lane l is first[l * lane + p * pixel].
template <class T>
struct Planes {
  T* first;
  int count;
  int64_t lane, pixel;
};

// Rows of up to kLanes channels as a padded image of kLanes channels.
class ScratchImage {
 public:
  float* at(int64_t row, int64_t column) { return data_ + ((row - first_row_) * pitch_ + left_ + column) * kLanes; }

  // Room for rows [first, last), to be written through at().
  void resize(int64_t first, int64_t last, int64_t width, int64_t left = 0, int64_t right = 0) {
    first_row_ = first;
    left_ = left;
    pitch_ = left + width + right;
    const size_t floats = size_t((last - first) * pitch_ * kLanes) + (kLanes + 1) * kLanes;
    if (storage_.size() < floats) storage_.resize(floats);
    // Aligned, since vectors that lie across two lines cost two accesses.
    const uintptr_t address = reinterpret_cast<uintptr_t>(storage_.data()), line = 4 * kLanes;
    data_ = storage_.data() + (line - address % line) % line / sizeof(float);
  }

  // Takes rows [first, last), with zeros for columns [-left, 0) and [width, width + right).
  template <class T>
  void fill(const Planes<const T>& planes, int64_t width, int64_t first, int64_t last, int64_t left, int64_t right) {
    resize(first, last, width, left, right);
    for (int64_t row = first; row < last; ++row) {
      std::fill(at(row, -left), at(row, 0), 0.f);
      std::fill(at(row, width), at(row, width + right), 0.f);
    }
    for_chunks(first * width, last * width, [&](int64_t pixel, int64_t some) {
      Vec v[kLanes];
      take(planes, pixel, some, last * width, v);
      int64_t row = pixel / width, column = pixel % width;
      float* to = at(row, column);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i >= some) break;
        store(to, v[i]);
        to += kLanes;
        if (++column == width) column = 0, to = at(++row, 0);
      }
    });
  }

  // Gives rows [first, last) of an image without padding.
  template <class T>
  void empty_into(const Planes<T>& planes, int64_t width, int64_t first, int64_t last, bool past_caches) {
    const int64_t pixels = (last - first) * width;
    // Small planes hardly ever start with a line of memory, but whole ones lie one behind the other: they are put
    // together in the cache, from where all of them can be streamed at once.
    const bool whole = past_caches && planes.lane == pixels && pixels % kLanes && aligned_for_stream(planes.first);
    T* staged = nullptr;
    if (whole) {
      if (staged_.size() < size_t(pixels * kLanes)) staged_.resize(pixels * kLanes);
      staged = reinterpret_cast<T*>(staged_.data());
    }
    const Planes<T> to{whole ? staged : planes.first, planes.count, planes.lane, planes.pixel};
    for_chunks(first * width, last * width, [&](int64_t pixel, int64_t some) {
      const float* from = data_ + (pixel - first * width) * kLanes;
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = load(from + i * kLanes);  // past `some` there is room, and no meaning
      give(to, pixel, some, v, past_caches && !whole);
    });
    if (!whole) return;
    const int64_t elements = pixels * planes.count;
    int64_t i = 0;
    for (; i + kLanes <= elements; i += kLanes) stream(planes.first + i, load(staged + i));
    std::copy(staged + i, staged + elements, planes.first + i);
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

  // `some` pixels of the planes, one a vector.
  template <class T>
  static void take(const Planes<const T>& planes, int64_t pixel, int64_t some, int64_t end, Vec (&v)[kLanes]) {
    const T* from = planes.first + pixel * planes.pixel;
    if (planes.lane == 1) {
      for (int64_t i = 0; i < some; ++i) v[i] = load_some(from + i * planes.pixel, planes.count);
      return;
    }
    if (planes.count == kLanes && some == kLanes) {
      // Where these planes end, the next ones follow.
      const int64_t ahead = pixel + kAhead < end ? kAhead : kAhead + (kLanes - 1) * planes.lane;
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        __builtin_prefetch(from + lane * planes.lane + ahead);
        v[lane] = load(from + lane * planes.lane);
      }
    } else {
      for (int lane = 0; lane < kLanes; ++lane)
        v[lane] = lane < planes.count ? load_some(from + lane * planes.lane, some) : Vec{};
    }
    transpose(v);
  }

  template <class T>
  static void give(const Planes<T>& planes, int64_t pixel, int64_t some, Vec (&v)[kLanes], bool past_caches) {
    T* to = planes.first + pixel * planes.pixel;
    if (planes.lane == 1) {
      for (int64_t i = 0; i < some; ++i) store_some(to + i * planes.pixel, v[i], planes.count);
      return;
    }
    transpose(v);
    if (planes.count < kLanes || some < kLanes) {
      for (int lane = 0; lane < planes.count; ++lane) store_some(to + lane * planes.lane, v[lane], some);
    } else if (past_caches && aligned_for_stream(to) && planes.lane % kLanes == 0) {
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) stream(to + lane * planes.lane, v[lane]);
    } else {
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) store(to + lane * planes.lane, v[lane]);
    }
  }

  std::vector<float> storage_, staged_;
  float* data_ = nullptr;
  int64_t first_row_ = 0, left_ = 0, pitch_ = 0;
};

// Their rows. One object a thread.
template <class T>
class PlaneRows {
 public:
  PlaneRows(const Gather& gather, const Conv2d& g, const Lanes& lanes)
      : gather_(gather), taps_(gather, g), lanes_(lanes), batch_(g.batch) {
    for (const Axis& axis : gather.horizontal) {
      if (!axis.taps()) continue;
      left_ = std::max(left_, -axis.offset.front());
      right_ = std::max(right_, (axis.count + kOverhang) * axis.step + axis.offset.back() + 1 - gather.in_w);
    }
  }

  // A vector of planes, in bands that fit into the cache with their input; at least 8 tasks where there are rows.
  static Tiling tiling(const Conv2d& g, const Lanes& lanes) {
    const int64_t images = (g.batch + lanes.images() - 1) / lanes.images();
    const int64_t vector = 4 * kLanes, in_row = g.in_w * vector, out_row = g.out_w * vector;
    const int64_t halo = int64_t(g.kernel_h - 1) * g.dilation_h * in_row;
    const int64_t fitting = (kCacheBytes - halo) / (g.stride_h * in_row + out_row);
    const int64_t parallel = g.out_h * images * lanes.vectors() / 8;
    const int64_t band = std::min(std::max<int64_t>(fitting, g.kernel_h), std::max<int64_t>(parallel, g.kernel_h));
    return {images, lanes.vectors(), 1, g.out_h, std::clamp<int64_t>(band, 1, g.out_h)};
  }

  // The tile's rows of the output.
  void convolve_rows(const T* in, const Finish& finish, T* out, const Tile& tile) {
    const int64_t phases = int64_t(gather_.horizontal.size());
    Ahead<float> in_cache{nullptr, 1, 0};
    const LaneFilter filters{finish.weights, finish.bias, taps_.kernel_size() * kLanes};
    const LaneFilter filter = filters.at(tile.first_vector);
    fill(in, tile);
    image_out_.resize(tile.first_row, tile.last_row, gather_.out_w);
    for (int64_t h = tile.first_row; h < tile.last_row; ++h) {
      taps_.set_row(h);
      for (int64_t phase = 0; phase < phases; ++phase) {
        const Axis& axis = gather_.horizontal[phase];
        const Taps taps = taps_.taps(phase);
        if (!axis.count) continue;
        const bool whole = taps_.whole_row(phase);
        const int width = whole ? int(axis.count) : block_width(axis.count);
        const int64_t blocks = (axis.count + width - 1) / width, pixel = phases * kLanes;
        const Sweep sweep{blocks, width * axis.step * kLanes, width * pixel, 0, 1, 0};
        const Outputs<float> outputs{image_out_.at(h, axis.first),           pixel,      width,
                                     int(axis.count - (blocks - 1) * width), finish.act, false};
        const Lines<float> pixels = lines(phase);
        const auto run = [&](auto block) { convolve(block, pixels, taps, filter, sweep, outputs, in_cache); };
        whole ? by_edge_block<Edge::both>(taps, width, run) : by_block(taps, width, run);
      }
    }
    image_out_.empty_into(planes(out, tile, gather_.out_h * gather_.out_w), gather_.out_w, tile.first_row,
                          tile.last_row, finish.past_caches);
  }

  // Adds the tile's rows of the output's gradient to the filter's gradient.
  void correlate_rows(const T* in, const T* grad, float* sums, int bias_tap, const Tile& tile) {
    fill(in, tile);
    image_out_.fill(planes(grad, tile, gather_.out_h * gather_.out_w), gather_.out_w, tile.first_row, tile.last_row, 0,
                    kOverhang);
    const Axis& axis = gather_.horizontal[0];
    Ahead<float> in_cache{nullptr, 1, 0};
    for (int64_t h = tile.first_row; h < tile.last_row; ++h) {
      taps_.set_row(h);
      const Taps taps = taps_.taps(0);
      const bool whole = taps_.whole_row(0);
      const int width = whole ? int(axis.count) : block_width(axis.count);
      const int64_t blocks = (axis.count + width - 1) / width;
      const Sweep sweep{blocks, width * axis.step * kLanes, width * kLanes, 0, 1, 0};
      const float* grads[8];
      for (int r = 0; r < width; ++r) grads[r] = image_out_.at(h, r);
      const Lines<float> pixels = lines(0);
      const auto run = [&](auto block) {
        correlate(block, pixels, taps, grads, sums + Lanes::at(tile.first_vector, 0, bias_tap + 1), 0, bias_tap, sweep,
                  in_cache);
      };
      whole ? by_edge_block<Edge::both>(taps, width, run) : by_block(taps, width, run);
    }
  }

  void flush(float*, int, int64_t) {}  // nothing is kept back

 private:
  static constexpr int kOverhang = 7;  // outputs by which the last block of a row may reach over its end

  template <class U>
  Planes<U> planes(U* images, const Tile& tile, int64_t pixels) const {
    const int64_t image = tile.image * lanes_.images(), first = tile.first_vector * kLanes;
    const int64_t here = std::min(lanes_.images(), batch_ - image) * lanes_.channels;
    const int count = int(std::min<int64_t>(kLanes, here - first));
    if (lanes_.nhwc) return {images + image * pixels * lanes_.channels, count, 1, lanes_.channels};
    return {images + (image * lanes_.channels + first) * pixels, count, pixels, 1};
  }

  // The input rows that the tile's output rows read.
  void fill(const T* in, const Tile& tile) {
    const int64_t phases = int64_t(gather_.vertical.size());
    int64_t first = gather_.in_h, last = 0;
    for (const Axis& axis : gather_.vertical) {
      if (!axis.taps()) continue;
      first = std::min(first, tile.first_row / phases * axis.step + axis.offset.front());
      last = std::max(last, (tile.last_row - 1) / phases * axis.step + axis.offset.back() + 1);
    }
    first = std::max<int64_t>(first, 0);
    last = std::max(first, std::min(last, gather_.in_h));
    image_in_.fill(planes(in, tile, gather_.in_h * gather_.in_w), gather_.in_w, first, last, left_, right_);
  }

  Lines<float> lines(size_t phase) {
    rows_.clear();
    for (int i = 0; i < taps_.rows(); ++i) rows_.push_back(image_in_.at(taps_.in_row(i), taps_.first_column(phase, 0)));
    return {rows_.data(), kLanes};
  }

  const Gather& gather_;
  RowTaps taps_;
  const Lanes lanes_;
  const int64_t batch_;
  int64_t left_ = 0, right_ = 0;
  ScratchImage image_in_, image_out_;
  std::vector<const float*> rows_;
};

}  // namespace rkl::cpu::RKL_ISA
