// Depthwise convolution of NHWC images, cut into tasks by their shapes and the machine, so that every sum has one order
// whatever the number of threads.
#pragma once
#include "cpu/depthwise/filter_window.h"
#include "cpu/depthwise/tiling.h"
#include "cpu/simd/scratch.h"

namespace rkl::cpu::RKL_ISA {

template <class T>
Image<T> nhwc_image(T* images, int64_t image, const Conv2d& g, bool output) {
  const int64_t h = output ? g.out_h : g.in_h, w = output ? g.out_w : g.in_w;
  return {images + image * h * w * g.channels, w * g.channels, g.channels};
}

// The images as the kernels take them. A filter one column wide at stride 1 reads each column for itself, so pixels
// that lie side by side can be channels too: as many of them as fill whole vectors (3 x 1 of 8 channels had half of
// each).
template <class T>
Conv2d in_whole_vectors(Conv2d g) {
  constexpr int64_t kWhole = Pixels<T>::kTogether * kLanes;
  const int64_t pixels = kWhole / std::gcd(g.channels, kWhole);
  if (!g.nhwc || g.kernel_w > 1 || g.stride_w > 1 || g.padding_w || g.in_w % pixels) return g;
  g.channels *= pixels, g.in_w /= pixels, g.out_w /= pixels;
  return g;
}

template <class T>
Lanes lanes_of(const Conv2d& g) {
  return {in_whole_vectors<T>(g).channels, g.nhwc, g.channels};
}

// Channels in parts so narrow that the rows which a filter spans stay in a core's cache, and the filter itself too, yet
// not so narrow that memory is read in short runs (33 px, 2048 channels, dilation 12: 28 ms in runs of 384 bytes, 20 ms
// in runs of 2 KiB; but 31 x 31: 23 ms for 24 vectors, 17.7 ms for 4).
// rows: of the input, that a pair of rows of outputs spans.
template <class T>
Tiling window_tiling(const Conv2d& g, int64_t rows, int64_t pairs, int64_t bands) {
  const int64_t vectors = lanes_of<T>(g).vectors(), line = kLanes * int64_t(sizeof(T));
  const int64_t span = rows * g.in_w * line;
  const int64_t rows_fit = std::max<int64_t>(cache_share() / span, 2048 / line);
  const int64_t filter = int64_t(operands<T>(g.kernel_h)) * g.kernel_w * kLanes * 4;
  const int64_t filter_fits = std::max<int64_t>((int64_t(256) << 10) / filter, 256 / line);
  const int64_t group = std::min({rows_fit, filter_fits, vectors});
  const int64_t parts = ceil_div(vectors, group);
  const int64_t even = ceil_div(ceil_div(vectors, parts), Pixels<T>::kTogether) * Pixels<T>::kTogether;
  const int64_t wanted = std::clamp<int64_t>(ceil_div(bands, g.batch * parts), 1, pairs);
  return {g.batch, vectors, even, pairs, ceil_div(pairs, wanted)};
}

template <class T>
void convolve_windows(const Conv2d& given, const T* x, const Finish& finish, T* y) {
  const Conv2d g = in_whole_vectors<T>(given);
  const Gather gather = forward_gather(g);
  const Lanes lanes = lanes_of<T>(given);
  const auto rows = [&] {
    return WindowRows<T>(gather, lanes, finish.weights, finish.bias, finish.act, g.in_w * g.channels);
  };
  const int64_t steps = rows().steps();
  const Tiling tiles = window_tiling<T>(g, g.kernel_h + 1, steps, 32);
  const int64_t tasks = tiles.units() * tiles.groups();
  const int64_t work = g.batch * g.channels * g.out_h * g.out_w * (g.kernel_h * g.kernel_w + 4) / tasks;
  torch::stable::parallel_for(0, tasks, kTaskWork / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    WindowRows<T> made = rows();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t band = task % tiles.bands(), group = task / tiles.bands() % tiles.groups();
      const int64_t image = task / tiles.bands() / tiles.groups();
      const Tile tile = tiles.tile(image * tiles.bands() + band, group, steps);
      for (int64_t step = tile.first_row; step < tile.last_row; ++step)
        made.make_step(nhwc_image(x, image, g, false), nhwc_image(y, image, g, true), step, tile.first_vector,
                       tile.last_vector, true);
    }
  });
}

// Both gradients in one pass: some rows of the image's, then of the filter's, while they are in the cache. The filter's
// is summed in slices of the batch, each for itself, and the slices are added in their order.
template <class T>
void gradient_windows(const Conv2d& given, const T* grad, const T* x, const T* weight, T* dx, T* dweight, T* dbias) {
  const Conv2d g = in_whole_vectors<T>(given);
  const Gather forward = forward_gather(g), gradient = gradient_gather(g);
  const Lanes lanes = lanes_of<T>(given);
  const std::vector<float> weights = pack_weights<T>(weight, gradient, g.kernel_h, g.kernel_w, lanes);
  const std::vector<float> no_bias(lanes.vectors() * kLanes);
  const auto rows = [&] {
    return WindowRows<T>(gradient, lanes, weights.data(), no_bias.data(), Activation::none, g.out_w * g.channels);
  };
  const auto filter_rows = [&] {
    return FilterRows<T>(forward, lanes, g.kernel_h, g.kernel_w, std::max(g.in_w, g.out_w) * g.channels);
  };
  const int64_t to_x = rows().pairs(), to_filter = filter_rows().pairs(), pairs = std::max(to_x, to_filter);
  const int taps = g.kernel_h * g.kernel_w;
  const bool wants_sums = dweight || dbias;
  const int64_t span = int64_t(g.kernel_h - 1) * g.dilation_h + 2;
  const Tiling tiles = window_tiling<T>(g, span, pairs, g.batch * g.channels * pairs);
  const int64_t pixels = g.batch * g.out_h * g.out_w;
  const int64_t slices = wants_sums ? tiles.slices(pixels, taps) : tiles.units();
  const int64_t slice_size = Lanes::at(lanes.vectors(), 0, taps + 1), tasks = slices * tiles.groups();
  const Scratch sums(wants_sums ? slices * slice_size * int64_t(sizeof(float)) : 0);  // a task makes zeros of its own
  const int64_t work = 2 * pixels * g.channels * (taps + 4) / tasks;
  torch::stable::parallel_for(0, tasks, kTaskWork / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    WindowRows<T> image_rows = rows();
    FilterRows<T> filter = filter_rows();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task % slices, group = task / slices;
      const Tile all = tiles.tile(0, group, 0);
      float* here = sums.as<float>() + slice * slice_size;
      if (wants_sums)
        std::fill(here + Lanes::at(all.first_vector, 0, taps + 1), here + Lanes::at(all.last_vector, 0, taps + 1), 0.f);
      for (int64_t u = tiles.units() * slice / slices; u < tiles.units() * (slice + 1) / slices; ++u) {
        const Tile at_x = tiles.tile(u, group, to_x), at_filter = tiles.tile(u, group, to_filter);
        const Image<const T> from = nhwc_image(grad, at_x.image, g, true), image = nhwc_image(x, at_x.image, g, false);
        for (int64_t pair = at_x.first_row; dx && pair < at_x.last_row; ++pair)
          image_rows.make(from, nhwc_image(dx, at_x.image, g, false), pair, at_x.first_vector, at_x.last_vector, true);
        for (int64_t pair = at_filter.first_row; wants_sums && pair < at_filter.last_row; ++pair)
          filter.add(image, from, pair, at_x.first_vector, at_x.last_vector, dbias, here);
      }
      if (wants_sums) filter.finish(all.first_vector, all.last_vector, here);
    }
  });
  if (wants_sums) reduce_sums(sums.as<float>(), slices, taps, lanes, dweight, dbias);
}

}  // namespace rkl::cpu::RKL_ISA
