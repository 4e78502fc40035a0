// How the general kernels (general.cu, general_filter_grad.cu) cut a convolution.
#pragma once
#include "cuda/plan.h"

namespace rkl::cuda::general {

constexpr int kThreads = 256;       // threads of a block
constexpr int kVectors = 8;         // 16-byte vectors of a pixel that a block has: 128 bytes, one cache line
constexpr int kChannelsAside = 32;  // channels of a block in NHWC's filter gradient
constexpr int kSums = 32;           // sums of a thread: so many that its loads are few beside its multiply-adds
constexpr int kPad = 16;            // bytes between taps in shared memory: without them all would begin in one bank
constexpr int kStaged = 24 * 1024;  // bytes of filter rows in shared memory at once, to leave the L1 cache large

// How a thread loads the inputs of its neighbouring outputs, or of its neighbouring taps of the filter's gradient.
enum Kernel {
  kScalars,  // one output at a time
  kApart,    // each output or tap loads its own inputs
  kSliding,  // NHWC at horizontal stride 1: neighbours share inputs, in a window that slides along the row
};

constexpr int vector_of(int size) { return 16 / size; }
// Neighbouring outputs that a thread makes.
constexpr int outputs_of(int size) { return kSums / vector_of(size); }
// Bytes that a tap of a block's channels takes in shared memory.
constexpr int kTapBytes = kVectors * 16 + kPad;

// Columns and rows of the taps that a thread of the filter's gradient has.
constexpr int taps_across(int kernel_w) { return kernel_w <= 8 ? 8 : 16; }
constexpr int taps_down(int kernel_w) { return kSums / taps_across(kernel_w); }

// A row's outputs in groups of neighbours that share inputs. At stride 1 such outputs are `step`, the dilation, apart,
// so each residue of the dilation has groups of its own.
struct Row {
  int step, residues, groups;
  Row(int64_t width, int step, int outputs)
      : step(step),
        residues(int(width < step ? width : step)),
        groups(residues * int(ceil_div(ceil_div(width, step), outputs))) {}
};

}  // namespace rkl::cuda::general
