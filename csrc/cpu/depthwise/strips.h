// Cuts a row of outputs into strips of columns, lattices, and pieces of a lattice's taps: what one window makes.
#pragma once
#include "cpu/depthwise/convolution_window.h"

namespace rkl::cpu::RKL_ISA {

// A row's lattice and its taps in pieces: one empty piece where it has no taps, as in a gradient (outputs are the
// bias).
struct Across {
  Lattice lattice;
  std::vector<Piece> pieces;

  explicit Across(const Lattice& l) : lattice(l) {
    const int most = l.step > 2 ? 1 : kMostTaps, count = std::max(1, (l.taps + most - 1) / most);
    for (int i = 0; i < count; ++i) {
      const int first = l.taps * i / count;
      pieces.emplace_back(l, first, l.taps * (i + 1) / count - first);
    }
  }
};

// Some columns of a row of outputs: all at once (row), and in the parts in which they are written past the caches
// (in_parts, empty where there is but one). read, written: where the strip's pixels and outputs begin.
struct Strip {
  std::vector<Across> row, in_parts;
  int64_t read, written;
};

// How many parts a row of outputs is written in past the caches, where neighbouring outputs lie `pitch` bytes apart;
// all channels of a part come before the next part. Memory takes successive lines at two thirds of its rate where they
// lie a multiple of 256 bytes apart, at a third for 512 (Zen 5: 128 channels in fp32 took 2.1 times as long by whole
// rows). 16-bit vectors come slowly enough for 256; blocks write several neighbouring outputs at a time anyway.
template <class T>
int64_t parts_of_row(const std::vector<Lattice>& lattices, int64_t pitch) {
  constexpr int64_t kVectors = kLineVectors<T>;
  if (pitch % (256 * kVectors)) return 1;
  int64_t longest = 0;
  for (const Lattice& l : lattices) {
    if (l.taps > kWindowTaps) return 1;
    longest = std::max(longest, l.count);
  }
  return longest / (pitch % 512 ? 32 : 16 * kVectors);
}

// Strip i of a row. streamed_pitch: `pitch` above, or 0 where outputs are not written past the caches.
template <class T>
Strip strip_of(const std::vector<Lattice>& row, int64_t i, int64_t strips, int64_t streamed_pitch) {
  const std::vector<Lattice> own = part_of(row, i, strips);
  Strip strip{{own.begin(), own.end()}, {}, 0, 0};
  if (i && !own.empty()) strip.read = own[0].first_input(), strip.written = own[0].first;
  const int64_t parts = streamed_pitch ? parts_of_row<T>(own, streamed_pitch) : 1;
  for (int64_t part = 0; parts > 1 && part < parts; ++part)
    for (const Lattice& l : part_of(own, part, parts)) strip.in_parts.emplace_back(l);
  return strip;
}

}  // namespace rkl::cpu::RKL_ISA
