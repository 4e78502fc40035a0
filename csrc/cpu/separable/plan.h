// How a separable convolution is made on a CPU, and how its output is cut into bands: by its shape and the machine,
// never by the number of threads, so that results are the same for any number of them.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/machine.h"
#include "cpu/separable/matrix.h"
#include "cpu/separable/separable.h"
#include "cpu/simd/scratch.h"
#include "geometry.h"

namespace rkl::cpu {

// Some whole images, or some rows of one image.
struct Band {
  Conv2d g;                     // the depthwise step that makes it
  int64_t image, first_in_row;  // where its input begins
  int64_t first_pixel, pixels;  // of the output: pixels over all images
};

// The output in bands of about `pixels` pixels.
class Bands {
 public:
  Bands(const Separable& s, int64_t pixels) : g_(s.g) {
    const Conv2d& g = s.g;
    const int64_t plane = g.out_h * g.out_w;
    images_ = std::clamp<int64_t>(pixels / plane, 1, g.batch);
    const int64_t pieces = std::min(g.out_h, std::max<int64_t>(1, (plane + pixels / 2) / pixels));
    // Four at a time: what a window makes at once.
    rows_ = images_ > 1 ? g.out_h : std::min(g.out_h, ceil_div(ceil_div(g.out_h, pieces), 4) * 4);
    per_image_ = ceil_div(g.out_h, rows_);
  }

  int64_t count() const { return ceil_div(g_.batch, images_) * per_image_; }

  int64_t most_pixels() const { return images_ * rows_ * g_.out_w; }

  Band operator[](int64_t i) const {
    const int64_t image = i / per_image_ * images_, row = i % per_image_ * rows_;
    Band band{g_, image, 0, (image * g_.out_h + row) * g_.out_w, 0};
    band.g.batch = std::min(images_, g_.batch - image);
    band.g.out_h = std::min(rows_, g_.out_h - row);
    // The rows of input above the band's window are skipped; what padding remains above them is the band's own.
    const int64_t top = row * g_.stride_h - g_.padding_h;
    band.first_in_row = std::clamp<int64_t>(top, 0, std::max<int64_t>(0, g_.in_h - 1));
    band.g.padding_h = int(band.first_in_row - top);
    band.g.in_h = g_.in_h - band.first_in_row;
    band.pixels = band.g.batch * band.g.out_h * g_.out_w;
    return band;
  }

 private:
  Conv2d g_;
  int64_t images_, rows_, per_image_;
};

// Rows of channels that a core's own cache holds beside their outputs and a block of weights.
inline int64_t rows_in_cache(int64_t channels, Dtype dtype) {
  return std::max<int64_t>(1, machine().l2_bytes / 8 * 3 / (channels * size_of(dtype)));
}

// A part's rows: the weights are read once for each part, the rows once for each block of weights.
constexpr int64_t kLeastRows = 64, kMostRows = 2048;
constexpr int64_t kTasks = 8;  // where there is enough work

// Operations that a thread takes at least: some 20 us, what waking it costs.
constexpr int64_t kThreadOperations = int64_t(1) << 21;

// Rows a part when `all` are cut into parts that stay in a core's cache: a multiple of kTasks parts, if they do not get
// smaller than `least`.
inline int64_t rows_a_part(int64_t all, int64_t channels, Dtype dtype, int64_t least) {
  const int64_t most = std::clamp(rows_in_cache(channels, dtype), kLeastRows, kMostRows);
  const int64_t parts = ceil_div(ceil_div(std::max<int64_t>(1, all), most), kTasks) * kTasks;
  return std::max(ceil_div(all, parts), least);
}

// Pixels a band.
inline int64_t band_pixels(const Conv2d& g, Dtype dtype) {
  return rows_a_part(g.batch * g.out_h * g.out_w, g.channels, dtype, kLeastRows);
}

// What is done at once, so that the depthwise output stays in cache, backward too, where it is made again.
enum class Fusion : int {
  none,    // the depthwise step over all images, then the pointwise step over them
  bands,   // some rows, or some small images, of NHWC
  images,  // one NCHW image
};

// How the pointwise filter's gradient, a sum over all pixels, is shared out.
enum class FilterGradient : int {
  tasks,     // by parts of the pixels, each a share of the sum, and of the filter
  pixels,    // by the library: by parts of the pixels
  channels,  // by the library: by output channels, for large filters of few pixels
};

// How a call is made, as a value: the launchers follow it and rk.explain reads it.
struct SeparablePlan {
  Fusion forward, backward;
  FilterGradient filter_gradient;  // where backward fuses nothing
};

// Whether NCHW images have planes that are worth a product of their own, an image at a time.
inline bool images_serve(const Conv2d& g, Dtype dtype) {
  return !g.nhwc && factor_type(dtype) == dtype && g.out_h * g.out_w >= 1024;
}

// Parts of the pixels, each with a share of the sum, and of the filter: of its outputs or, if there are more of them,
// of its channels.
struct Shares {
  int64_t pixels, filter;
};

// A share is written and read again, which takes as long as some 50 pixels do, and all of them together hold 64 MiB at
// most; each part of the filter reads all of dz or of the depthwise output. Powers of 2, so that as many threads, or
// half as many, have equal parts.
inline Shares plan_shares(int64_t pixels, int64_t c, int64_t c_out) {
  constexpr int64_t kLeastPixels = 512, kLeastChannels = 64, kMostSums = int64_t(1) << 24;
  const int64_t most = 2 * pixels * c * c_out / kThreadOperations, longer = std::max(c, c_out);
  const int64_t most_shares = std::min(pixels / kLeastPixels, kMostSums / std::max<int64_t>(1, c * c_out));
  Shares shares{1, 1};
  const auto tasks = [&] { return shares.pixels * shares.filter; };
  while (tasks() < 2 * kTasks && tasks() <= most / 2 && 2 * shares.pixels <= most_shares) shares.pixels *= 2;
  while (tasks() < kTasks / 2 && tasks() <= most / 2 && 2 * shares.filter * kLeastChannels <= longer)
    shares.filter *= 2;
  return shares;
}

// Whether NHWC images are multiplied here, by pointwise_rows, and not by the library: it has the matrix instructions of
// AMX for bf16, and some machines have instructions for fp16. (Not measured on those. A Zen 4 core, which has neither:
// 113 to 117 GFLOP/s in fp32 and 230 to 235 in bf16, by the library 92 to 111 and 210 to 220.) Pairs of bf16 want an
// even number.
inline bool multiplies(Dtype dtype) {
  if (dtype == Dtype::f16) return factor_type(dtype) != dtype;
  return dtype == Dtype::f32 || !machine().amx;
}
inline bool multiplies_rows(int64_t channels, Dtype dtype) {
  return multiplies(dtype) && channels > 0 && (dtype != Dtype::bf16 || channels % 2 == 0);
}

// Whether bands are worth their making: enough of them, and not so thin that most rows of the image that a band's
// window spans are read for its neighbours too (dilations of 6, 33 px, 2048 channels: 47 ms unfused, 51 in bands).
inline bool bands_serve(const Conv2d& g, Dtype dtype) {
  const int64_t pixels = band_pixels(g, dtype), rows = std::min(ceil_div(pixels, g.out_w), g.out_h);
  const int64_t beyond = int64_t(g.kernel_h - 1) * g.dilation_h;
  return g.batch * g.out_h * g.out_w >= kTasks * kLeastRows && (rows == g.out_h || beyond <= 2 * rows * g.stride_h);
}

inline SeparablePlan plan_separable(const Conv2d& g, int64_t c_out, Dtype dtype) {
  const int64_t pixels = g.batch * g.out_h * g.out_w;
  const Fusion images = images_serve(g, dtype) ? Fusion::images : Fusion::none;
  if (!g.nhwc || !multiplies(dtype)) {
    const bool few = 4 * pixels <= c_out && c_out >= 256;
    return {images, images, few ? FilterGradient::channels : FilterGradient::pixels};
  }
  const bool forward = multiplies_rows(g.channels, dtype) && bands_serve(g, dtype);
  // Each part of the filter would make all bands again.
  const bool backward = forward && multiplies_rows(c_out, dtype) && plan_shares(pixels, g.channels, c_out).filter == 1;
  const auto bands = [](bool serve) { return serve ? Fusion::bands : Fusion::none; };
  return {bands(forward), bands(backward), FilterGradient::tasks};
}

}  // namespace rkl::cpu
