// Which part of the images a task works on.
#pragma once
#include "cpu/machine.h"
#include "cpu/simd/vec.h"

namespace rkl::cpu::RKL_ISA {

// Multiply-adds a thread takes at least: some microseconds, what waking it costs.
constexpr int64_t kTaskWork = int64_t(1) << 18;

// What a task works on: a band of rows of one image (or one group of images that share a vector), some vectors of it, a
// strip of its columns.
struct Tile {
  int64_t image, first_vector, last_vector, first_row, last_row, strip;
};

// The tasks of one pass: images x groups of vectors in strips of columns x bands of rows.
struct Tiling {
  int64_t images, vectors, group, rows, band, strips = 1;

  int64_t groups() const { return ceil_div(vectors, group) * strips; }
  int64_t bands() const { return ceil_div(rows, band); }
  int64_t units() const { return images * bands(); }

  // Parts of the units whose sums for a filter's gradient are made apart, and then added in their order: few enough
  // that adding them stays small beside reading the images, which have so many pixels.
  int64_t slices(int64_t pixels, int taps) const {
    return std::min({units(), 32 / groups() + 1, pixels / (8 * taps) + 1});
  }

  // Band `unit % bands` of an image with `height` rows, which need not be the `rows` that the bands were made for.
  Tile tile(int64_t unit, int64_t g, int64_t height) const {
    const int64_t b = unit % bands(), first = g / strips * group;
    return {unit / bands(), first, std::min(vectors, first + group), height * b / bands(), height * (b + 1) / bands(),
            g % strips};
  }
};

// Of a core's second-level cache, what a task may fill with the rows that it works on: 640 KiB of the 1 MiB of a Zen 4
// core, where the measurements beside the tilings were taken.
inline int64_t cache_share() { return machine().l2_bytes / 8 * 5; }

}  // namespace rkl::cpu::RKL_ISA
