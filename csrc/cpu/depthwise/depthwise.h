// Depthwise convolution: which class makes the rows of an image, and how images become tasks.
#pragma once
#include "cpu/depthwise/nchw_3x3.h"
#include "cpu/depthwise/nchw_3x3_stride2.h"
#include "cpu/depthwise/nchw_transposed.h"
#include "cpu/depthwise/nhwc.h"
#include "cpu/simd/elementwise.h"
#include "cpu/simd/scratch.h"

namespace rkl::cpu::RKL_ISA {

template <class Rows, class T>
void convolve_all(const Conv2d& g, const Lanes& lanes, const T* x, const Finish& finish, T* y) {
  const Gather gather = forward_gather(g);
  const int64_t height = Rows(gather, g, lanes, finish).height();
  const Tiling tiles = Rows::tiling(g, lanes, height);
  const int64_t tasks = tiles.units() * tiles.groups();
  const int64_t work = g.batch * g.channels * g.out_h * g.out_w * (g.kernel_h * g.kernel_w + 4) / tasks;
  torch::stable::parallel_for(0, tasks, kTaskWork / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    Rows rows(gather, g, lanes, finish);
    for (int64_t task = begin; task < end; ++task) {
      // Bands vary fastest: neighbouring bands share rows.
      const int64_t band = task % tiles.bands(), group = task / tiles.bands() % tiles.groups();
      const int64_t image = task / tiles.bands() / tiles.groups();
      rows.convolve_rows(x, y, tiles.tile(image * tiles.bands() + band, group, height));
    }
  });
}

// Both gradients in one pass. Of each band the image's gradient is made first, then the filter's, while the band's rows
// are in the cache. Each slice of the batch has its own sums for the filter's; the slices are added in order.
template <class Rows, class T>
void gradients(const Conv2d& g, const Lanes& lanes, const T* grad, const T* x, const T* weight, T* dx, T* dweight,
               T* dbias) {
  using Filter = typename Rows::Filter;
  const Gather forward = forward_gather(g), gradient = gradient_gather(g);
  const LineVector<float> weights = pack_weights<typename Rows::Operand>(weight, gradient, g, lanes);
  const LineVector<float> no_bias(lanes.vectors() * kLanes);
  const Finish finish{weights.data(), no_bias.data(), Activation::none};
  const int64_t to_x = Rows(gradient, g, lanes, finish).height(),
                to_weight = Filter(forward, g, lanes, dbias != nullptr).height();
  const Tiling tiles = Rows::tiling(g, lanes, std::max(to_x, to_weight));
  const int taps = g.kernel_h * g.kernel_w;
  const bool wants_sums = dweight || dbias;
  const int64_t pixels = g.batch * g.out_h * g.out_w;
  const int64_t slices = wants_sums ? tiles.slices(pixels, taps) : tiles.units();
  const int64_t slice_size = Lanes::at(lanes.vectors(), 0, taps + 1), tasks = slices * tiles.groups();
  const Scratch sums(wants_sums ? slices * slice_size * int64_t(sizeof(float)) : 0);
  const int64_t work = 2 * pixels * g.channels * (taps + 4) / tasks;
  torch::stable::parallel_for(0, tasks, kTaskWork / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    Rows to_image(gradient, g, lanes, finish);
    Filter to_filter(forward, g, lanes, dbias != nullptr);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task % slices, group = task / slices;
      const Tile all = tiles.tile(0, group, 0);
      float* here = sums.as<float>() + slice * slice_size;
      if (wants_sums) to_filter.begin(here, all);
      for (int64_t u = tiles.units() * slice / slices; u < tiles.units() * (slice + 1) / slices; ++u) {
        const Tile at_x = tiles.tile(u, group, to_x), at_weight = tiles.tile(u, group, to_weight);
        if (dx && at_x.first_row < at_x.last_row) to_image.convolve_rows(grad, dx, at_x);
        if (wants_sums && at_weight.first_row < at_weight.last_row) to_filter.correlate_rows(x, grad, here, at_weight);
      }
      if (wants_sums) to_filter.finish(here, all);
    }
  });
  if (wants_sums) reduce_sums(sums.as<float>(), slices, taps, lanes, dweight, dbias);
}

// Calls f<Rows>(g, lanes) with the class that makes the rows, forward or for both gradients, and with the images and
// channels as that class takes them.
template <class T, bool forward, class F>
auto with_rows(const Conv2d& given, F&& f) {
  const Conv2d g = in_whole_vectors<T>(given);
  const Lanes lanes{g.channels, g.channels >= kLanes, given.channels};
  if (g.nhwc && lanes.whole) return f.template operator()<NhwcRows<T, forward>>(g, lanes);
#if RKL_LANES == 16
  const Lanes planes{g.channels, false, given.channels};
  if (FlatRows<T>::serves(g)) return f.template operator()<FlatRows<T>>(g, planes);
  if constexpr (forward)
    if (HalvingRows<T>::serves(g)) return f.template operator()<HalvingRows<T>>(g, planes);
#endif
  return f.template operator()<PlaneRows<T>>(g, lanes);
}

template <class T>
PackedFilter pack_filter(const Conv2d& given, const void* weight, const void* bias) {
  return with_rows<T, true>(given, [&]<class Rows>(const Conv2d& g, const Lanes& lanes) {
    using Operand = typename Rows::Operand;
    return PackedFilter{pack_weights<Operand>(static_cast<const T*>(weight), forward_gather(g), g, lanes),
                        pack_bias<Operand>(static_cast<const T*>(bias), lanes)};
  });
}

template <class T>
void depthwise_packed(const Conv2d& given, const void* x, const PackedFilter& filter, Activation act,
                      int64_t image_bytes, void* y) {
  with_rows<T, true>(given, [&]<class Rows>(const Conv2d& g, const Lanes& lanes) {
    const Finish finish{filter.weights.data(), filter.bias.data(), act, image_bytes};
    convolve_all<Rows>(g, lanes, static_cast<const T*>(x), finish, static_cast<T*>(y));
  });
}

template <class T>
void depthwise_backward(const Conv2d& given, const void* grad, const void* x, const void* weight, void* dx,
                        void* dweight, void* dbias) {
  with_rows<T, false>(given, [&]<class Rows>(const Conv2d& g, const Lanes& lanes) {
    gradients<Rows>(g, lanes, static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const T*>(weight),
                    static_cast<T*>(dx), static_cast<T*>(dweight), static_cast<T*>(dbias));
  });
}

}  // namespace rkl::cpu::RKL_ISA
