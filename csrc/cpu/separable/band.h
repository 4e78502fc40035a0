// Cuts the output of a separable convolution into bands, whose depthwise output stays in a core's cache.
#pragma once
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/separable/plan.h"
#include "cpu/separable/separable.h"
#include "cpu/simd/scratch.h"

namespace rkl::cpu {

// Some rows of one image, or all of some images.
struct ImageRows {
  int64_t image, images, row, rows;
};

struct Band {
  Conv2d g;  // the band's depthwise step, in NHWC, from the rows that the band reads
  ImageRows in, out;
  int64_t pixels;  // of the output, over all images
};

// Bands of about `pixels` pixels of output.
class Bands {
 public:
  Bands(const Conv2d& g, int64_t pixels) : g_(g) {
    g_.nhwc = true;
    const int64_t plane = g.out_h * g.out_w;
    images_ = std::clamp<int64_t>(pixels / plane, 1, g.batch);
    const int64_t pieces = std::min(g.out_h, std::max<int64_t>(1, (plane + pixels / 2) / pixels));
    // A multiple of four rows, which windows make together.
    rows_ = images_ > 1 ? g.out_h : std::min(g.out_h, ceil_div(ceil_div(g.out_h, pieces), 4) * 4);
    per_image_ = ceil_div(g.out_h, rows_);
  }

  // The whole depthwise step, in NHWC as the bands make it.
  const Conv2d& depthwise() const { return g_; }
  int64_t count() const { return ceil_div(g_.batch, images_) * per_image_; }

  // Pixels of the largest band's output, and of what the band reads.
  int64_t most_pixels() const { return images_ * rows_ * g_.out_w; }
  int64_t most_read() const { return images_ * std::min(span(rows_), g_.in_h) * g_.in_w; }

  Band operator[](int64_t i) const {
    const int64_t image = i / per_image_ * images_, row = i % per_image_ * rows_;
    const int64_t images = std::min(images_, g_.batch - image), rows = std::min(rows_, g_.out_h - row);
    // The band reads those rows under its windows that exist. Padding above them is the band's own.
    const int64_t top = row * g_.stride_h - g_.padding_h, first = std::clamp<int64_t>(top, 0, g_.in_h - 1);
    const int64_t read = std::max<int64_t>(1, std::min(top + span(rows), g_.in_h) - first);
    Band band{g_, {image, images, first, read}, {image, images, row, rows}, images * rows * g_.out_w};
    band.g.batch = images;
    band.g.in_h = read;
    band.g.out_h = rows;
    band.g.padding_h = int(first - top);
    return band;
  }

 private:
  // Rows under the windows of `rows` rows of outputs, padding included. A band of several images spans all their rows,
  // read or not: the next image lies behind them.
  int64_t span(int64_t rows) const {
    if (images_ > 1) return g_.padding_h + g_.in_h;
    return (rows - 1) * g_.stride_h + int64_t(g_.kernel_h - 1) * g_.dilation_h + 1;
  }

  Conv2d g_;
  int64_t images_, rows_, per_image_;
};

// Images whose rows bands read or make as NHWC: in place or, for NCHW images, in a band's own memory (`own`).
class BandImages {
 public:
  BandImages(const void* images, int64_t channels, int64_t height, int64_t width, const Separable& s)
      : images_(const_cast<void*>(images)), channels_(channels), height_(height), width_(width), s_(s) {}

  const void* read(const ImageRows& rows, void* own) const {
    if (s_.g.nhwc) return made_at(rows, own);
    for (int64_t i = 0; i < rows.images; ++i)
      kernels(s_.dtype).planes_to_rows(plane(rows, i), height_ * width_, own_image(rows, i, own), channels_, channels_,
                                       rows.rows * width_);
    return own;
  }

  // Bytes of the images that read() points into; 0 where it returns the band's own memory.
  int64_t bytes() const { return s_.g.nhwc ? s_.g.batch * height_ * width_ * channels_ * size_of(s_.dtype) : 0; }

  // Where a band makes rows. It calls written(rows, own) when they are made.
  void* made_at(const ImageRows& rows, void* own) const {
    return s_.g.nhwc ? at(images_, (rows.image * height_ + rows.row) * width_ * channels_, s_.dtype) : own;
  }
  void written(const ImageRows& rows, void* own) const {
    for (int64_t i = 0; !s_.g.nhwc && i < rows.images; ++i)
      kernels(s_.dtype).rows_to_planes(own_image(rows, i, own), channels_, plane(rows, i), height_ * width_, channels_,
                                       rows.rows * width_);
  }

 private:
  void* plane(const ImageRows& rows, int64_t i) const {
    return at(images_, ((rows.image + i) * channels_ * height_ + rows.row) * width_, s_.dtype);
  }
  void* own_image(const ImageRows& rows, int64_t i, void* own) const {
    return at(own, i * rows.rows * width_ * channels_, s_.dtype);
  }

  void* const images_;
  const int64_t channels_, height_, width_;
  const Separable& s_;
};

// A pointwise filter in the order in which pointwise_rows reads it.
Scratch packed(const PointwiseFilter& filter, Dtype dtype);

// Whether `rows` rows of outputs are written past the caches. They are not where an activation reads them again.
inline bool streams_rows(const void* out, int64_t rows, int64_t outputs, Activation act, Dtype dtype) {
  const int64_t row = outputs * size_of(dtype);
  return act == Activation::none && exceeds_caches(rows * row, torch::stable::get_num_threads()) &&
         in_whole_lines(out, row) && is_resident(at(out, rows / 2 * outputs, dtype));
}

}  // namespace rkl::cpu
