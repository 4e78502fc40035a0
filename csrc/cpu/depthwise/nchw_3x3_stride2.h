// NCHW planes under a 3 x 3 filter at stride 2, forward, read in place. A vector is 16 outputs of one row or, in maps
// up to 8 wide, 8 outputs of each of two rows. Of 32 pixels (or of twice 16) one permutation picks the even ones and
// another the odd ones. Masks make zeros of what lies outside the image.
#pragma once
#include "cpu/depthwise/nchw_3x3.h"

#if RKL_LANES == 16
namespace rkl::cpu::RKL_ISA {

template <class T>
class HalvingRows {
 public:
  using Operand = float;

  static bool serves(const Conv2d& g) { return is_3_by_3_on_planes<T>(g, 2); }

  // A task takes some rows of a large plane, or so many channels of small planes that it is worth a thread.
  static Tiling tiling(const Conv2d& g, const Lanes&, int64_t) {
    const int64_t band = std::clamp<int64_t>(kTaskPixels / (2 * g.in_w), 2, std::max<int64_t>(2, g.out_h));
    const int64_t group = std::clamp<int64_t>(kTaskPixels / (g.in_h * g.in_w), 1, g.channels);
    return {g.batch, g.channels, group, g.out_h, band};
  }

  HalvingRows(const Gather&, const Conv2d& g, const Lanes&, const Finish& finish) : g_(g), finish_(finish) {}

  int64_t height() const { return g_.out_h; }

  void convolve_rows(const T* in, T* out, const Tile& tile) const {
    for (int64_t channel = tile.first_vector; channel < tile.last_vector; ++channel) {
      const int64_t plane = tile.image * g_.channels + channel;
      const Plane from{in + plane * g_.in_h * g_.in_w, g_.in_h, g_.in_w};
      T* to = out + plane * g_.out_h * g_.out_w;
      g_.out_w <= kLanes / 2 ? by_pairs(from, channel, tile, to) : by_rows(from, channel, tile, to);
    }
  }

 private:
  static constexpr int kTaps = 9;
  static constexpr int64_t kTaskPixels = 16384;

  struct Plane {
    const T* first;
    int64_t height, width;

    // A mask of the pixels that exist among the kLanes from `column` on.
    uint16_t lanes(int64_t column) const {
      return uint16_t((1u << std::clamp<int64_t>(width - column, 0, kLanes)) - 1);
    }
    // Prefetches 32 pixels of two rows 8 KiB ahead, in later rows or the next plane: the hardware does not foresee them
    // (96 channels, 112 px, batch 8, one thread: 1.7 ms; 6.1 ms without, and with vectors going down columns).
    RKL_INLINE void ask(int64_t row, int64_t column) const {
      constexpr int64_t kLead = 8192 / sizeof(T);
      const T* next = first + row * width + column + kLead;
      for (int64_t i = 0; i < 2 * kLanes; i += kLine / int64_t(sizeof(T))) {
        __builtin_prefetch(next + i);
        __builtin_prefetch(next + width + i);
      }
    }
    // Loads some lanes of a row; zeros where there is no such row.
    RKL_INLINE Vec take(int64_t row, int64_t column, uint16_t lanes) const {
      return factor_masked(first + row * width + column, row >= 0 && row < height ? lanes : uint16_t(0));
    }
  };

  // The pixels under a row's three taps, for 16 outputs. a, b: 32 pixels, the first under the first output's middle
  // tap. before: the pixels to their left. left: the lanes that have a pixel to their left; the others get zeros.
  static RKL_INLINE void under_taps(Vec a, Vec b, Vec before, uint16_t left, Vec* x) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    x[1] = (Vec)_mm512_permutex2var_ps((__m512)a, even, (__m512)b);
    x[2] = (Vec)_mm512_permutex2var_ps((__m512)a, _mm512_or_epi32(even, _mm512_set1_epi32(1)), (__m512)b);
    x[0] = (Vec)_mm512_maskz_alignr_epi32(left, (__m512i)x[2], (__m512i)before, kLanes - 1);
  }

  void by_rows(const Plane& from, int64_t channel, const Tile& tile, T* out) const {
    const ChannelFilter<T> filter(finish_, channel);
    for (int64_t h = tile.first_row; h < tile.last_row; ++h) {
      T* to = out + h * g_.out_w;
      for (int64_t w = 0; w < g_.out_w; w += kLanes) {
        const uint16_t in_a = from.lanes(2 * w), in_b = from.lanes(2 * w + kLanes), in_before = w > 0 ? 0x8000 : 0;
        from.ask(2 * h, 2 * w);
        Vec x[kTaps];
    RKL_UNROLL for (int i = 0; i < 3; ++i) {
          const int64_t row = 2 * h - 1 + i;
          under_taps(from.take(row, 2 * w, in_a), from.take(row, 2 * w + kLanes, in_b),
                     from.take(row, 2 * w - kLanes, in_before), 0xffff, x + 3 * i);
        }
        store_up_to(to + w, filter.outputs(x), g_.out_w - w);
      }
    }
  }

  // Two rows of outputs at a time.
  void by_pairs(const Plane& from, int64_t channel, const Tile& tile, T* out) const {
    const ChannelFilter<T> filter(finish_, channel);
    constexpr int kHalf = kLanes / 2;
    constexpr uint16_t kNotFirst = 0xfefe;  // all lanes but the first of each row, which has no pixel to its left
    const int64_t width = g_.out_w;
    const uint16_t lanes = from.lanes(0);
    for (int64_t h = tile.first_row; h < tile.last_row; h += 2) {
      Vec x[kTaps];
      RKL_UNROLL for (int i = 0; i < 3; ++i) {
        const int64_t row = 2 * h - 1 + i;
        under_taps(from.take(row, 0, lanes), from.take(row + 2, 0, lanes), Vec{}, kNotFirst, x + 3 * i);
      }
      const Vec y = filter.outputs(x);
      T* to = out + h * width;
      const bool both = h + 1 < tile.last_row;
      if (width == kHalf && both) {
        store(to, y);
        continue;
      }
      store_some(to, y, width);
      if (both) store_some(to + width, (Vec)_mm512_maskz_alignr_epi32(0xffff, (__m512i)y, (__m512i)y, kHalf), width);
    }
  }

  const Conv2d g_;
  const Finish finish_;
};

}  // namespace rkl::cpu::RKL_ISA
#endif
