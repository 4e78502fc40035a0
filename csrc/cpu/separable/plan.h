// How a separable convolution is made on a CPU and cut into parts.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/machine.h"
#include "cpu/separable/library.h"
#include "cpu/simd/scratch.h"
#include "geometry.h"

namespace rkl::cpu {

// Bounds on a part's rows: a part reads the weights once, and its rows once for each block of weights.
constexpr int64_t kLeastRows = 64, kMostRows = 2048;
constexpr int64_t kTasks = 8;  // where there is enough work

// The fewest operations worth a thread: they take some 20 us, as long as waking it.
constexpr int64_t kThreadOperations = int64_t(1) << 21;

// Rows of a part, where `all` rows are cut into parts that stay in a core's cache, beside their outputs and a block of
// weights: a multiple of kTasks parts, unless the parts would be smaller than `least`.
inline int64_t rows_a_part(int64_t all, int64_t channels, Dtype dtype, int64_t least) {
  const int64_t most = std::clamp(machine().l2_bytes / 8 * 3 / (channels * size_of(dtype)), kLeastRows, kMostRows);
  const int64_t parts = ceil_div(ceil_div(std::max<int64_t>(1, all), most), kTasks) * kTasks;
  return std::max(ceil_div(all, parts), least);
}

// Pixels of a band. For NCHW images the cache also holds the band's own memory, for what it reads or makes.
inline int64_t band_pixels(const Conv2d& g, int64_t c_out, Dtype dtype) {
  const int64_t c = g.channels, own = std::max(c_out, c * g.stride_h * g.stride_w);
  return rows_a_part(g.batch * g.out_h * g.out_w, g.nhwc ? c : (c + own) / 2, dtype, kLeastRows);
}

// How the pointwise filter's gradient, a sum over all pixels, is cut into tasks.
enum class FilterGradient : int {
  tasks,     // by the kernels here: by parts of the pixels and of the filter
  pixels,    // by oneDNN: by parts of the pixels
  channels,  // by oneDNN: by output channels, for large filters of few pixels
};

// How a call is made. The launchers follow it, and rk.explain shows it.
struct SeparablePlan {
  bool forward, backward;          // in bands, of NHWC or NCHW images; else step by step, of NHWC images
  FilterGradient filter_gradient;  // where backward is not in bands
};

// How many parts the pixels are cut into, each with its own share of the sum, and how many the filter is cut into: by
// outputs or by channels, whichever are more.
struct Shares {
  int64_t pixels, filter;
};

// Writing a share and reading it again takes as long as some 50 pixels. All shares together hold at most 64 MiB. Each
// part of the filter reads all of dz or of the depthwise output. Powers of 2 give as many threads, or half as many,
// equal parts.
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

// Whether pointwise_rows multiplies NHWC images. oneDNN does instead where it has the matrix instructions of AMX for
// bf16, or instructions for fp16. (Not measured on such machines. A Zen 4 core, which has neither: 113 to 117 GFLOP/s
// in fp32 and 230 to 235 in bf16, by oneDNN 92 to 111 and 210 to 220.) bf16 channels are multiplied in pairs, so
// multiplies_rows wants an even number of them.
inline bool multiplies(Dtype dtype) {
  return factor_type(dtype) != dtype || dtype == Dtype::f32 || (dtype == Dtype::bf16 && !machine().amx);
}
inline bool multiplies_rows(int64_t channels, Dtype dtype) {
  return multiplies(dtype) && channels > 0 && (dtype != Dtype::bf16 || channels % 2 == 0);
}

// Whether bands serve: there are enough, and they are not so thin that most of the rows which a band reads are read for
// its neighbours too (dilations of 6, 33 px, 2048 channels: 47 ms unfused, 51 in bands).
inline bool bands_serve(const Conv2d& g, int64_t c_out, Dtype dtype) {
  const int64_t rows = std::min(ceil_div(band_pixels(g, c_out, dtype), g.out_w), g.out_h);
  const int64_t beyond = int64_t(g.kernel_h - 1) * g.dilation_h;
  return g.batch * g.out_h * g.out_w >= kTasks * kLeastRows && (rows == g.out_h || beyond <= 2 * rows * g.stride_h);
}

inline SeparablePlan plan_separable(const Conv2d& g, int64_t c_out, Dtype dtype) {
  const int64_t pixels = g.batch * g.out_h * g.out_w;
  if (!multiplies(dtype)) {
    const bool few = 4 * pixels <= c_out && c_out >= 256;
    return {false, false, few ? FilterGradient::channels : FilterGradient::pixels};
  }
  const bool forward = multiplies_rows(g.channels, dtype) && bands_serve(g, c_out, dtype);
  // With several parts of the filter, each part would make all bands again.
  const bool backward = forward && multiplies_rows(c_out, dtype) && plan_shares(pixels, g.channels, c_out).filter == 1;
  return {forward, backward, FilterGradient::tasks};
}

}  // namespace rkl::cpu
