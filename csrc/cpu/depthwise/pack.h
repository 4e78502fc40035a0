// Packs filters and biases in the order in which windows read them.
#pragma once
#include "cpu/depthwise/pixels.h"
#include "cpu/simd/lanes.h"

namespace rkl::cpu::RKL_ISA {

// How many operands a column of `taps` taps has.
template <class T>
int operands(int taps) {
  return (taps + Pixels<T>::kRows - 1) / Pixels<T>::kRows;
}

// Floats of a vector's weights for one phase down and one phase across, of which axes or lattices tell the taps:
// (operand, tap, lane).
template <class T, class Taps>
int64_t table_size(const Taps& down, const Taps& across) {
  return int64_t(operands<T>(down.taps)) * across.taps * kLanes;
}

// How many vectors a kernel loads together from v on: kTogether if all are whole and overlap no other, else one.
template <class Operand>
int64_t vectors_together(const Lanes& lanes, int64_t v) {
  return (v + Pixels<Operand>::kTogether) * kLanes <= lanes.channels ? Pixels<Operand>::kTogether : 1;
}

// A filter (C, kernel_h, kernel_w) as weights (phase down, phase across, vector, operand of a column, tap of a row,
// lane) of a gather. Forward has one phase. Operand: the type in which pixels meet the weights.
template <class Operand, class T>
LineVector<float> pack_weights(const T* filter, const Gather& gather, const Conv2d& g, const Lanes& lanes) {
  constexpr int kRows = Pixels<Operand>::kRows, kTogether = Pixels<Operand>::kTogether;
  int64_t size = 0;
  for (const Axis& down : gather.vertical)
    for (const Axis& across : gather.horizontal) size += table_size<Operand>(down, across);
  const int64_t taps = g.kernel_h * g.kernel_w * kLanes;
  LineVector<float> out(size * lanes.vectors()), by_tap(kTogether * taps);
  for (int64_t v = 0, count; v < lanes.vectors(); v += count) {
    count = vectors_together<Operand>(lanes, v);
    for (int64_t i = 0; i < count; ++i)
      as_lanes(filter, g.kernel_h * g.kernel_w, lanes, v + i, by_tap.data() + i * taps);
    float* phase = out.data();
    for (const Axis& down : gather.vertical)
      for (const Axis& across : gather.horizontal) {
        const auto weight = [&](int64_t i, int a, int t) {
          const int64_t tap = (down.tap + a * down.apart) * g.kernel_w + across.tap + t * across.apart;
          return a < down.taps ? read<Vec>(&by_tap[i * taps + tap * kLanes]) : Vec{};
        };
        const int64_t vector = table_size<Operand>(down, across);
        float* to = phase + v * vector;
        for (int a = 0; a < down.taps; a += kRows)
          for (int t = 0; t < across.taps; ++t, to += kLanes) {
            Vec here[kTogether] = {};
            for (int64_t i = 0; i < count; ++i) here[i] = Pixels<Operand>::weight(weight(i, a, t), weight(i, a + 1, t));
            if (count == kTogether) Pixels<Operand>::cross(here);
            for (int64_t i = 0; i < count; ++i) store(to + i * vector, here[i]);
          }
        phase += lanes.vectors() * vector;
      }
  }
  return out;
}

// A bias (C) as (vector, lane): what sums begin with. Zeros where it is null.
template <class Operand, class T>
LineVector<float> pack_bias(const T* bias, const Lanes& lanes) {
  constexpr int kTogether = Pixels<Operand>::kTogether;
  LineVector<float> out(lanes.vectors() * kLanes);
  for (int64_t v = 0; bias && v < lanes.vectors(); ++v) as_lanes(bias, 1, lanes, v, &out[v * kLanes]);
  for (int64_t v = 0; vectors_together<Operand>(lanes, v) > 1; v += kTogether) {
    Vec here[kTogether];
    for (int i = 0; i < kTogether; ++i) here[i] = read<Vec>(&out[(v + i) * kLanes]);
    Pixels<Operand>::cross(here);
    for (int i = 0; i < kTogether; ++i) store(&out[(v + i) * kLanes], here[i]);
  }
  return out;
}

}  // namespace rkl::cpu::RKL_ISA
