// Depthwise convolution: tensors cut into tasks by their shapes alone, so that every sum has one order whatever the
// number of threads.
#pragma once
#include "cpu/depthwise_flat.h"
#include "cpu/depthwise_halving.h"
#include "cpu/depthwise_planes.h"
#include "cpu/depthwise_wide.h"
#include "cpu/elementwise.h"

namespace rkl::cpu::RKL_ISA {

// Multiply-adds a thread takes at least: some microseconds, what waking it costs.
constexpr int64_t kTaskWork = int64_t(1) << 18;

template <class T>
bool worth_streaming(const T* out, const Lanes& lanes, int64_t elements, bool read_next = false) {
  const bool aligned = aligned_for_stream(out) && (!lanes.in_place() || lanes.channels % kLanes == 0);
  return aligned && elements * int64_t(sizeof(T)) >= (read_next ? kStreamBytesReadNext : kStreamBytes);
}

template <class Rows, class T>
void convolve_all(const Conv2d& g, const Lanes& lanes, const T* x, const Finish& finish, T* y) {
  const Gather gather = forward_gather(g);
  const Tiling tiles = Rows::tiling(g, lanes);
  const int64_t tasks = tiles.units() * tiles.groups();
  const int64_t work = g.batch * g.channels * g.out_h * g.out_w * (g.kernel_h * g.kernel_w + 4) / tasks;
  torch::stable::parallel_for(0, tasks, kTaskWork / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    Rows rows(gather, g, lanes);
    for (int64_t task = begin; task < end; ++task) {
      // Bands fastest: neighbours share rows.
      const int64_t band = task % tiles.bands(), group = task / tiles.bands() % tiles.groups();
      const int64_t image = task / tiles.bands() / tiles.groups();
      rows.convolve_rows(x, finish, y, tiles.tile(image * tiles.bands() + band, group, g.out_h));
    }
    stream_fence();
  });
}

// Both gradients in one pass: of each band first the image's, then the filter's, while its rows are in the cache.
// The filter's is summed in slices of the batch, each for itself, and the slices are added in their order.
template <class Rows, class T>
void gradients(const Conv2d& g, const Lanes& lanes, const T* grad, const T* x, const Finish& finish, T* dx, T* dweight,
               T* dbias) {
  const Gather forward = forward_gather(g), gradient = gradient_gather(g);
  const Tiling tiles = Rows::tiling(g, lanes);
  const int taps = g.kernel_h * g.kernel_w;
  const bool wants_sums = dweight || dbias;
  // Few enough that adding the slices stays small beside reading the images.
  const int64_t pixels = g.batch * g.out_h * g.out_w;
  const int64_t most = std::min({tiles.units(), 32 / tiles.groups() + 1, pixels / (8 * taps) + 1});
  const int64_t slices = wants_sums ? most : tiles.units();
  const int64_t slice_size = Lanes::at(lanes.vectors(), 0, taps + 1), tasks = slices * tiles.groups();
  std::vector<float> sums(wants_sums ? slices * slice_size : 0);
  const int64_t work = 2 * pixels * g.channels * (taps + 4) / tasks;
  torch::stable::parallel_for(0, tasks, kTaskWork / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    Rows to_image(gradient, g, lanes), to_filter(forward, g, lanes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task % slices, group = task / slices;
      for (int64_t u = tiles.units() * slice / slices; u < tiles.units() * (slice + 1) / slices; ++u) {
        if (dx) to_image.convolve_rows(grad, finish, dx, tiles.tile(u, group, g.in_h));
        if (wants_sums)
          to_filter.correlate_rows(x, grad, sums.data() + slice * slice_size, taps, tiles.tile(u, group, g.out_h));
      }
      if (wants_sums) to_filter.flush(sums.data() + slice * slice_size, taps, group * tiles.group);
    }
    stream_fence();
  });
  if (wants_sums) reduce_sums(sums, slices, taps, lanes, dweight, dbias);
}

// Calls f with the kind of rows that serves, as a null pointer.
template <class T, class F>
void with_rows(const Conv2d& g, const Lanes& lanes, F&& f) {
  if (lanes.in_place()) return f(static_cast<NhwcRows<T>*>(nullptr));
#if RKL_LANES == 16
  if (FlatRows<T>::serves(g)) return f(static_cast<FlatRows<T>*>(nullptr));
#endif
  if (WideRows<T>::serves(g))
    f(static_cast<WideRows<T>*>(nullptr));
  else
    f(static_cast<PlaneRows<T>*>(nullptr));
}

inline PackedFilter pack_filter(const Conv2d& g, const void* weight, const void* bias, Dtype dtype) {
  PackedFilter filter;
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Lanes lanes{g.channels, g.nhwc};
    filter.weights = as_lanes(static_cast<const T*>(weight), g.kernel_h * g.kernel_w, lanes);
    filter.bias = as_lanes(static_cast<const T*>(bias), 1, lanes);
  });
  return filter;
}

inline void depthwise_packed(const Conv2d& g, const void* x, const PackedFilter& filter, Activation act, void* y,
                             Dtype dtype, bool read_next) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Lanes lanes{g.channels, g.nhwc};
    T* out = static_cast<T*>(y);
    const bool past_caches = worth_streaming(out, lanes, g.batch * g.channels * g.out_h * g.out_w, read_next);
    const Finish finish{filter.weights.data(), filter.bias.data(), act, past_caches};
    const auto run = [&](auto* rows) {
      convolve_all<std::remove_pointer_t<decltype(rows)>>(g, lanes, static_cast<const T*>(x), finish, out);
    };
#if RKL_LANES == 16
    if (HalvingRows<T>::serves(g)) return run(static_cast<HalvingRows<T>*>(nullptr));
#endif
    with_rows<T>(g, lanes, run);
  });
}

inline void depthwise(const Conv2d& g, const void* x, const void* weight, const void* bias, Activation act, void* y,
                      Dtype dtype, bool read_next) {
  depthwise_packed(g, x, pack_filter(g, weight, bias, dtype), act, y, dtype, read_next);
}

inline void depthwise_backward(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx,
                               void* dweight, void* dbias, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Lanes lanes{g.channels, g.nhwc};
    const std::vector<float> weights = as_lanes(static_cast<const T*>(weight), g.kernel_h * g.kernel_w, lanes);
    const std::vector<float> no_bias(lanes.vectors() * kLanes);
    const T *from = static_cast<const T*>(grad), *image = static_cast<const T*>(x);
    T *to_x = static_cast<T*>(dx), *to_weight = static_cast<T*>(dweight), *to_bias = static_cast<T*>(dbias);
    const bool past_caches = dx && worth_streaming(to_x, lanes, g.batch * g.channels * g.in_h * g.in_w);
    const Finish finish{weights.data(), no_bias.data(), Activation::none, past_caches};
    with_rows<T>(g, lanes, [&](auto* rows) {
      gradients<std::remove_pointer_t<decltype(rows)>>(g, lanes, from, image, finish, to_x, to_weight, to_bias);
    });
  });
}

}  // namespace rkl::cpu::RKL_ISA
