// Which part of the images a task works on.
#pragma once
#include "cpu/machine.h"
#include "cpu/simd/vec.h"

namespace rkl::cpu::RKL_ISA {

// The fewest multiply-adds worth a thread: they take some microseconds, as long as waking it.
constexpr int64_t kTaskWork = int64_t(1) << 18;

// What a task works on: a band of rows of one image (or of one group of images that share a vector), some of its
// vectors of channels, and one strip of its columns.
struct Tile {
  int64_t image, first_vector, last_vector, first_row, last_row, strip;
};

// The tasks of one pass: images x bands of rows x groups of vectors x strips of columns.
struct Tiling {
  int64_t images, vectors, group, rows, band, strips = 1;

  int64_t groups() const { return ceil_div(vectors, group) * strips; }
  int64_t bands() const { return ceil_div(rows, band); }
  int64_t units() const { return images * bands(); }

  // How many slices the units are cut into for a filter's gradient. Each slice has its own sums, and they are added in
  // order. There are few slices: adding them must take little beside reading the images' `pixels` pixels.
  int64_t slices(int64_t pixels, int taps) const {
    return std::min({units(), 32 / groups() + 1, pixels / (8 * taps) + 1});
  }

  // Band `unit % bands` of an image with `height` rows, which need not be `rows`, for which the bands were made.
  Tile tile(int64_t unit, int64_t g, int64_t height) const {
    const int64_t b = unit % bands(), first = g / strips * group;
    return {unit / bands(), first, std::min(vectors, first + group), height * b / bands(), height * (b + 1) / bands(),
            g % strips};
  }
};

// Bytes of a core's second-level cache that a task's rows may fill: 640 KiB of the 1 MiB of a Zen 4 core, where the
// measurements beside the tilings were taken.
inline int64_t cache_share() { return machine().l2_bytes / 8 * 5; }

}  // namespace rkl::cpu::RKL_ISA
