// NCHW planes under a 3 x 3 filter at stride 1, read in place. A vector is any 16 pixels that follow each other in
// memory, across the ends of rows. The rows above and below lie at a fixed distance; the columns to the left and right
// are shifted in from neighbouring vectors, with a mask where a row ends. So a vector takes three loads, nothing is
// copied, padded or transposed, and narrow maps waste no lanes. Masks are those of AVX-512.
#pragma once
#include "cpu/depthwise/pixels.h"
#include "cpu/depthwise/tiling.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/math.h"
#include "cpu/simd/transpose.h"

#if RKL_LANES == 16
namespace rkl::cpu::RKL_ISA {

// Whether planes are read in place: NCHW, 3 x 3 with one pixel of padding, at this stride. The smallest planes are not,
// as windows make many of their vectors in one call (both gradients, two threads: 512 channels, 4 px, fp32 0.40 ms in
// place, 0.26 by windows; 256 channels, 8 px, bf16 0.53 and 0.34; but fp32 of 7 px 1.15 and 2.09).
template <class T>
bool is_3_by_3_on_planes(const Conv2d& g, int stride) {
  if (g.in_h * g.in_w <= (sizeof(T) == 4 ? 16 : 64)) return false;
  const bool one_around = g.padding_h == 1 && g.padding_w == 1 && g.dilation_h == 1 && g.dilation_w == 1;
  return !g.nhwc && one_around && g.stride_h == stride && g.stride_w == stride && g.kernel_h == 3 && g.kernel_w == 3;
}

// A channel's filter, bias and activation.
template <class T>
struct ChannelFilter {
  Vec weight[9], bias;
  Activation act;

  RKL_INLINE ChannelFilter(const Finish& finish, int64_t channel)
      : bias(broadcast(finish.bias[channel])), act(finish.act) {
    RKL_UNROLL for (int i = 0; i < 9; ++i) {
      weight[i] = as_factor(broadcast(finish.weights[Lanes::at_channel(channel, i, 9)]), T{});
    }
  }

  // The outputs over these pixels, which lie row by row of the taps. Each row has its own sum: nine multiply-adds into
  // one sum would wait for each other.
  RKL_INLINE Vec outputs(const Vec (&x)[9]) const {
    Vec row[3] = {bias, Vec{}, Vec{}};
    RKL_UNROLL for (int i = 0; i < 9; ++i) row[i / 3] = multiply_add(row[i / 3], x[i], weight[i], T{});
    const Vec sum = row[0] + (row[1] + row[2]);
    return act == Activation::none ? sum : activate(act, sum, T{});
  }
};

template <class T>
class FlatRows {
 public:
  static bool serves(const Conv2d& g) { return is_3_by_3_on_planes<T>(g, 1) && g.in_h * g.in_w <= kMostPixels; }

  // A task takes whole planes, of so many channels that it is worth a thread.
  static Tiling tiling(const Conv2d& g, const Lanes&, int64_t) {
    const int64_t group = std::clamp<int64_t>(kGroupPixels / (g.in_h * g.in_w), 1, g.channels);
    return {g.batch, g.channels, group, g.out_h, g.out_h};
  }

  using Filter = FlatRows;
  using Operand = float;

  FlatRows(const Gather& gather, const Conv2d& g, const Lanes& lanes, bool) : FlatRows(gather, g, lanes, Finish{}) {}

  FlatRows(const Gather& gather, const Conv2d&, const Lanes& lanes, const Finish& finish)
      : lanes_(lanes), finish_(finish), width_(gather.out_w), pixels_(gather.out_h * gather.out_w) {
    masks_.resize(ceil_div(pixels_, kLanes) + 1);
    for (int64_t v = 0; v + 1 < int64_t(masks_.size()); ++v)
      for (int i = 0; i < 3; ++i) masks_[v].row[i] = inside(v * kLanes + (i - 1) * width_);
    for (int64_t first = 0; first < pixels_; first += width_) {
      const int64_t last = first + width_ - 1;
      masks_[first / kLanes].left &= ~(1u << first % kLanes);
      masks_[last / kLanes].right &= ~(1u << last % kLanes);
    }
  }

  int64_t height() const { return pixels_ / width_; }

  void convolve_rows(const T* in, T* out, const Tile& tile) {
    for (int64_t channel = tile.first_vector; channel < tile.last_vector; ++channel) {
      const int64_t plane = (tile.image * lanes_.channels + channel) * pixels_;
      convolve(in + plane, channel, out + plane);
    }
  }

  // sums: (vector, tap, lane). Here a tile's vectors are channels. The tile of the last channels also clears the idle
  // lanes behind them, which count as other images' where channels are few.
  void begin(float* sums, const Tile& all) {
    sums_.assign((all.last_vector - all.first_vector) * kRows * kLanes, 0.f);
    const int64_t end = all.last_vector < lanes_.channels ? all.last_vector : lanes_.vectors() * kLanes;
    for (int64_t channel = all.last_vector; channel < end; ++channel)
      for (int row = 0; row < kRows; ++row) sums[Lanes::at_channel(channel, row, kRows)] = 0;
  }

  // Adds the tile's share of the filter's gradient to sums_; finish() moves the total to `sums`.
  void correlate_rows(const T* in, const T* grad, float*, const Tile& tile) {
    for (int64_t channel = tile.first_vector; channel < tile.last_vector; ++channel) {
      const int64_t plane = (tile.image * lanes_.channels + channel) * pixels_;
      correlate(in + plane, grad + plane, sums_.data() + (channel - tile.first_vector) * kRows * kLanes);
    }
  }

  void finish(float* sums, const Tile& all) const {
    sum_lanes(sums_.data(), sums_.size() / kLanes, [&](int64_t i, float sum) {
      sums[Lanes::at_channel(all.first_vector + i / kRows, i % kRows, kRows)] = sum;
    });
  }

 private:
  static constexpr int kTaps = 9, kRows = kTaps + 1;  // the last row of sums is the bias's
  static constexpr int64_t kMostPixels = 32768, kGroupPixels = 8192;

  struct Masks {                             // of a vector's lanes
    uint16_t left = 0xffff, right = 0xffff;  // those that have a pixel beside them in their row
    uint16_t row[3] = {};                    // those that have a pixel above, in place and below
  };

  // A mask of the pixels inside the plane among the kLanes from `at` on.
  uint16_t inside(int64_t at) const {
    const int64_t first = std::clamp<int64_t>(-at, 0, kLanes), last = std::clamp<int64_t>(pixels_ - at, first, kLanes);
    return uint16_t((1u << last) - (1u << first));
  }

  // The pixels above those of vector v (i = 0), its own (1) or those below (2); zeros outside the plane.
  RKL_INLINE Vec take(const T* plane, int64_t v, int i) const {
    const T* from = plane + v * kLanes + (i - 1) * width_;
    const uint16_t inside = masks_[v].row[i];
    return inside == 0xffff ? factor(from) : factor_masked(from, inside);
  }

  // Calls f(v, the pixels under the nine taps of vector v) for each vector of a plane.
  template <class F>
  RKL_INLINE void for_windows(const T* plane, F&& f) const {
    Vec before[3], here[3];
    // Nothing lies to the left of the first pixel, so nothing before the first vector is loaded. What lies behind the
    // last vector is masked out.
    RKL_UNROLL for (int i = 0; i < 3; ++i) {
      before[i] = Vec{};
      here[i] = take(plane, 0, i);
    }
    const int64_t vectors = int64_t(masks_.size()) - 1;
    for (int64_t v = 0; v < vectors; ++v) {
      const Masks m = masks_[v];
      Vec x[kTaps];
      RKL_UNROLL for (int i = 0; i < 3; ++i) {
        const Vec after = take(plane, v + 1, i);
        x[3 * i] = (Vec)_mm512_maskz_alignr_epi32(m.left, (__m512i)here[i], (__m512i)before[i], kLanes - 1);
        x[3 * i + 1] = here[i];
        x[3 * i + 2] = (Vec)_mm512_maskz_alignr_epi32(m.right, (__m512i)after, (__m512i)here[i], 1);
        before[i] = here[i];
        here[i] = after;
      }
      f(v, x);
    }
  }

  void convolve(const T* in, int64_t channel, T* out) const {
    const ChannelFilter<T> filter(finish_, channel);
    for_windows(in, [=, this](int64_t v, const Vec(&x)[kTaps]) __attribute__((always_inline)) {
      store_up_to(out + v * kLanes, filter.outputs(x), pixels_ - v * kLanes);
    });
  }

  void correlate(const T* in, const T* grad, float* sums) const {
    Vec sum[kRows];
    RKL_UNROLL for (int i = 0; i < kRows; ++i) sum[i] = load(sums + i * kLanes);
    for_windows(in, [&](int64_t v, const Vec(&x)[kTaps]) __attribute__((always_inline)) {
      const Vec g = take(grad, v, 1);
      sum[kTaps] += widened(g, T{});
      RKL_UNROLL for (int i = 0; i < kTaps; ++i) sum[i] = multiply_add(sum[i], x[i], g, T{});
    });
    RKL_UNROLL for (int i = 0; i < kRows; ++i) store(sums + i * kLanes, sum[i]);
  }

  const Lanes lanes_;
  const Finish finish_;
  const int64_t width_, pixels_;  // of a plane
  std::vector<Masks> masks_;      // one for each vector
  LineVector<float> sums_;        // (channel, kRows, kLanes)
};

}  // namespace rkl::cpu::RKL_ISA
#endif
