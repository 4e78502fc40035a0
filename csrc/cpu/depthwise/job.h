// What one call of a kernel makes: outputs of one or two rows.
#pragma once
#include "cpu/depthwise/lattice.h"
#include "cpu/depthwise/pixels.h"

namespace rkl::cpu::RKL_ISA {

// Memory to ask for, a line of some rows at each step: a kernel reads a few pixels of several rows at every vector of
// channels, too short runs for the hardware to foresee, so what the next rows need is asked for in the order of memory.
struct Prefetch {
  const char* from;
  int64_t step, row;  // bytes from one step's to the next's, from one row's to the next's; no step: nothing to ask for
  bool in_columns;    // a vector's steps go down its own columns, beside the last vector's; else all go on in one line
};

// To ask for nothing. Blocks ask all the same: for a line that is at hand.
inline Prefetch nothing(const void* at_hand) { return {static_cast<const char*>(at_hand), 0, 0, false}; }

// A line of each of so many rows, at `at`, which goes on to the next step's.
template <int rows, bool to_write>
RKL_INLINE void ask(const Prefetch& p, const char*& at, int64_t step) {
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) __builtin_prefetch(at + row * p.row, to_write, 2);
  at += step;
}

// How far windows look ahead where pixels come from far: elements from a column to the one that is asked for, in the
// vector after next or, of wide rows, further on. That is 30 to 60 steps, as a line from the third-level cache takes
// longer than the instructions that are in flight at once.
template <class T>
int64_t elements_ahead(int64_t columns, int64_t pitch) {
  constexpr int64_t kNarrow = 64, kColumns = 32;
  return columns <= kNarrow ? 2 * kLine / int64_t(sizeof(T)) : kColumns * pitch;
}

// One call: the outputs of a lattice, of one or two rows, of some vectors of channels. Two rows are Pixels::kRows rows
// of the lattice apart, so that they share their operands and their weights.
template <class T>
struct Job {
  const T* const* rows;               // of the image, Pixels::kRows an operand
  int made;                           // rows of outputs, 1 or 2
  int units;                          // operands of a column of the filter
  int shift;                          // operands from the first row of outputs to the second
  int begin, end;                     // operands of which a pixel lies inside the image
  bool odd;                           // the last operand's lower pixel does not count
  const float* weights;               // (vector, operand, tap, lane), crossed where two vectors go together
  int64_t weight_row, weight_vector;  // floats from one operand's, one vector's to the next's
  int64_t at, pitch;                  // elements from a row's start to the first column, from one column to the next
  const float* start[2];              // what the sums begin with: the bias, or sums of other taps
  int64_t start_step;                 // floats from one output's to the next's: 0 for the bias
  T* out[2];                          // the first output of each row
  bool streams;                       // outputs go past the caches
  int64_t out_pitch;
  float* sums[2];                     // where the sums go, instead of rounded ones to out; or null
  int64_t first;                      // step
  int64_t count, inputs, step, left;  // of the lattice
  int64_t vectors;
  Prefetch read, written;
  int64_t ahead;  // as elements_ahead(); 0 where nothing comes from far
};

// Whether 0 <= i < count, by one comparison: each step of a window asks a few times.
RKL_INLINE bool exists(int64_t i, int64_t count) { return uint64_t(i) < uint64_t(count); }

}  // namespace rkl::cpu::RKL_ISA
