// Lattices: classes of the outputs of one dimension, made so that the inputs which a class reads are neighbours within
// the class. So one dense window serves every stride, dilation and phase of a gradient.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cpu/depthwise/gather.h"

namespace rkl::cpu {

// Output i lies at first + pitch * i. Its tap t reads input c = step * i + t - left of the class, which lies at origin
// + unit * c. `inputs` counts the inputs that exist and that some output reads. (No other may count: an infinity in a
// pixel that no output reads, times zero, would make NaN of a sum.)
struct Lattice {
  int64_t first, pitch, count;
  int64_t origin, unit, inputs;
  int64_t step, left;
  int phase;  // index of the axis: which of the filter's taps these are
  int taps;

  // Where the c-th input and output i lie.
  int64_t input(int64_t c) const { return origin + unit * c; }
  int64_t output(int64_t i) const { return first + pitch * i; }

  // The first input that an output from i on reads and no output before i does.
  int64_t new_input(int64_t i) const { return i ? step * (i - 1) - left + taps : std::max<int64_t>(0, -left); }
  // Where the first input lies that the outputs read.
  int64_t first_input() const { return input(new_input(0)); }
};

// The rows to prefetch: those that are read and written next. They belong to output i of lattice l or, behind its last
// output, to output `i_after` of the lattice that comes next, if any. (33 rows under a dilation of 18 make lattices of
// one or two. Prefetches behind them were of another image: forward took 1.3 to 1.6 times as long, Zen 5.)
struct RowsAhead {
  int64_t read, written;
  RowsAhead(const Lattice& l, int64_t i, const Lattice* after, int64_t i_after)
      : read(l.new_input(i) < l.inputs || !after ? l.input(l.new_input(i))
                                                 : after->input(after->new_input(0) + after->step * i_after)),
        written(i < l.count || !after ? l.output(i) : after->output(i_after)) {}
};

// Output i of an axis reads step * i + offset + distance * t. With q = distance / gcd(step, distance), the outputs
// q * j + r read inputs a whole number of distances apart.
inline std::vector<Lattice> lattices_of(const std::vector<Axis>& axes, int64_t in) {
  // One distance for all phases, even of one tap or none: lattices have one pitch, and bands of rows hold whole pairs.
  int64_t distance = 1;
  for (const Axis& axis : axes)
    if (axis.taps > 1) distance = axis.distance;
  const int phases = int(axes.size());
  std::vector<Lattice> lattices;
  for (int phase = 0; phase < phases; ++phase) {
    const Axis& axis = axes[phase];
    const int64_t q = distance / std::gcd<int64_t>(axis.step, distance), step = axis.step * q / distance;
    for (int64_t r = 0; r < std::min(q, axis.count); ++r) {
      const int64_t from = axis.step * r + axis.offset, origin = ((from % distance) + distance) % distance;
      const int64_t left = (origin - from) / distance, count = ceil_div(axis.count - r, q);
      const int64_t read = std::min(ceil_div(in - origin, distance), step * (count - 1) + axis.taps - left);
      const int64_t inputs = axis.taps ? std::max<int64_t>(0, read) : 0;
      lattices.push_back(
          {phase + phases * r, phases * q, count, origin, distance, inputs, step, left, phase, axis.taps});
    }
  }
  return lattices;
}

// Part i of `parts` parts of the outputs. The outputs of a part follow each other.
inline std::vector<Lattice> part_of(const std::vector<Lattice>& lattices, int64_t i, int64_t parts) {
  std::vector<Lattice> part;
  for (Lattice l : lattices) {
    const int64_t from = l.count * i / parts;
    l.count = l.count * (i + 1) / parts - from;
    if (!l.count) continue;
    l.first += l.pitch * from;
    l.left -= l.step * from;
    part.push_back(l);
  }
  return part;
}

// `count` taps of a lattice, from tap t0 on, which a window takes at once. first, last: the window's steps.
struct Piece {
  int first_tap, taps;
  int64_t left, first, last;
  int64_t most;  // outputs that a column may belong to
  Piece(const Lattice& l, int t0, int count)
      : first_tap(t0), taps(count), left(l.left - t0), most(count <= 1 ? 1 : ceil_div(count, l.step)) {
    first = left <= 0 ? 0 : taps <= 1 ? ceil_div(left, l.step) : left / l.step;
    const int64_t reached = l.inputs + left <= 0 ? 0 : ceil_div(l.inputs + left, l.step);
    last = std::max(first, std::min(reached, l.count + most - 1));
  }
};

}  // namespace rkl::cpu
