// What one call of a kernel makes: outputs of one or two rows.
#pragma once
#include "cpu/depthwise/lattice.h"
#include "cpu/depthwise/pixels.h"

namespace rkl::cpu::RKL_ISA {

// What a kernel prefetches: at each step a cache line of some rows, in the order of memory. Its own reads, a few pixels
// of several rows for each vector of channels, are too short runs for the hardware prefetcher.
struct Prefetch {
  const char* from;
  int64_t step, row;  // bytes from one step, and from one row, to the next; step 0: nothing is prefetched
  bool in_columns;    // each vector's steps go down its own columns; else all vectors' steps are one run of memory
};

// No prefetch. Blocks prefetch all the same: the line at `at_hand`, which is in a cache.
inline Prefetch nothing(const void* at_hand) { return {static_cast<const char*>(at_hand), 0, 0, false}; }

// Prefetches a line in each of `rows` rows at `at`, and moves `at` on by `step`.
template <int rows, bool to_write>
RKL_INLINE void ask(const Prefetch& p, const char*& at, int64_t step) {
  RKL_UNROLL for (int row = 0; row < rows; ++row) __builtin_prefetch(at + row * p.row, to_write, 2);
  at += step;
}

// How far ahead windows prefetch pixels that come from far: elements from a column to the prefetched one. That lies in
// the vector after next or, in wide rows, further on in the same vector, 30 to 60 steps ahead: a line from the
// third-level cache takes longer than all instructions in flight.
template <class T>
int64_t elements_ahead(int64_t columns, int64_t pitch) {
  constexpr int64_t kNarrow = 64, kColumns = 32;
  return columns <= kNarrow ? 2 * kLine / int64_t(sizeof(T)) : kColumns * pitch;
}

// One call: the outputs of a lattice, of one or two rows, of some vectors of channels. Two rows are Pixels::kRows rows
// of the lattice apart, so that they share their operands and their weights.
template <class T>
struct Job {
  const T* const* rows;  // of the image, Pixels::kRows for each operand
  int made;              // rows of outputs, 1 or 2
  int units;             // operands of a column of the filter
  int shift;             // operands from the first row of outputs to the second
  int begin, end;        // the first operand with a pixel inside the image, and one past the last
  bool odd;              // the last operand's lower pixel does not count
  const float* weights;  // (vector, operand, tap, lane); crossed (pixels.h) where two vectors are loaded together
  int64_t weight_row, weight_vector;  // floats from one operand, and from one vector, to the next
  int64_t at, pitch;                  // elements from a row's start to the first column, from one column to the next
  const float* start[2];              // what the sums begin with: the bias, or sums of other taps
  int64_t start_step;                 // floats from one output to the next: 0 for the bias
  T* out[2];                          // the first output of each row
  bool streams;                       // outputs go past the caches
  int64_t out_pitch;
  float* sums[2];                     // where sums go unrounded, in place of outputs to out; or null
  int64_t first;                      // the first step
  int64_t count, inputs, step, left;  // of the lattice
  int64_t vectors;
  Prefetch read, written;
  int64_t ahead;  // as elements_ahead(); 0 where nothing comes from far
};

// Whether 0 <= i < count, by one comparison: each step of a window makes this test a few times.
RKL_INLINE bool exists(int64_t i, int64_t count) { return uint64_t(i) < uint64_t(count); }

}  // namespace rkl::cpu::RKL_ISA
