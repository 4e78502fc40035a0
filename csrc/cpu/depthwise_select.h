// Which block serves a row's taps and outputs.
#pragma once
#include "cpu/depthwise_block.h"

namespace rkl::cpu::RKL_ISA {

// Outputs of the blocks of a row: those of 8 or 7 that make fewer in all, of 4 in short rows. 8 sums, 7 weights and a
// pixel fit into the 16 registers of AVX2.
inline int block_width(int64_t row) {
  const int64_t by_8 = (row + 7) / 8 * 8, by_7 = (row + 6) / 7 * 7, by_4 = (row + 3) / 4 * 4;
  if (row < 7 || by_4 + row / 8 < std::min(by_8, by_7)) return 4;
  return by_8 <= by_7 ? 8 : 7;
}

// Calls g(width) for the width of a block.
template <class G>
inline void with_width(int width, G&& g) {
  if (width == 8)
    g(std::integral_constant<int, 8>{});
  else if (width == 7)
    g(std::integral_constant<int, 7>{});
  else
    g(std::integral_constant<int, 4>{});
}

// Whether there are blocks for just so many neighbouring taps.
inline bool is_exact(const Taps& taps) {
  return taps.consecutive && (taps.columns == 3 || taps.columns == 5 || taps.columns == 7);
}

// Calls g(taps) for an exact number of them.
template <class G>
inline void with_exact(const Taps& taps, G&& g) {
  if (taps.columns == 7)
    g(std::integral_constant<int, 7>{});
  else if (taps.columns == 5)
    g(std::integral_constant<int, 5>{});
  else
    g(std::integral_constant<int, 3>{});
}

// Calls f with the block of `width` (8, 7, 4, 2 or 1) outputs that takes taps one by one.
template <class F>
inline void by_single_taps(int width, F&& f) {
  if (width == 1)
    f(Block<0, 1, 1, false>{});
  else if (width == 2)
    f(Block<0, 2, 1, false>{});
  else
    with_width(width, [&](auto r) { f(Block<0, r(), 1, false>{}); });
}

// Whether a row's taps go one by one.
inline bool goes_singly(const Taps& taps) {
  return !taps.consecutive || taps.columns < 3 || (taps.step > 1 && !(taps.step == 2 && is_exact(taps)));
}

// Calls f with the block of `width` (8, 7 or 4) outputs that serves the taps. Other than 3, 5 and 7 taps go by 7 or by
// 3 and what remains.
template <class F>
inline void by_block(const Taps& taps, int width, F&& f) {
  if (goes_singly(taps)) return by_single_taps(width, f);
  with_width(width, [&](auto r) {
    if (is_exact(taps) && taps.step == 1)
      with_exact(taps, [&](auto k) { f(Block<k(), r()>{}); });
    else if (is_exact(taps))
      with_exact(taps, [&](auto k) { f(Block<k(), r(), 2>{}); });
    else if (taps.columns > 7)
      f(Block<7, r(), 1, false>{});
    else
      f(Block<3, r(), 1, false>{});
  });
}

// The same at an edge of a row, or for all of it, with exact taps centred on their outputs.
template <Edge edge, int step = 1, class F>
inline void by_edge_block(const Taps& taps, int width, F&& f) {
  if constexpr (step == 2)
    if (width == 2) return with_exact(taps, [&](auto k) { f(Block<k(), 2, step, true, edge>{}); });
  with_width(width, [&](auto r) { with_exact(taps, [&](auto k) { f(Block<k(), r(), step, true, edge>{}); }); });
}

}  // namespace rkl::cpu::RKL_ISA
