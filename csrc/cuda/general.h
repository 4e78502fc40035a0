// How the general kernels (general.cu, general_filter_grad.cu) cut a convolution.
#pragma once
#include "cuda/plan.h"

namespace rkl::cuda::general {

constexpr int kThreads = 256;       // of a block
constexpr int kVectors = 8;         // vectors of 16 bytes a pixel and block: 128 bytes, one cache line
constexpr int kChannelsAside = 32;  // of a block of NHWC's filter gradient
constexpr int kSums = 32;           // of a thread: enough for its loads to be few beside its multiply-adds
constexpr int kPad = 16;            // bytes between two taps in shared memory, or all would begin in one bank
constexpr int kStaged = 24 * 1024;  // bytes of the filter's rows in shared memory at once: the rest is the first cache

// How a thread's outputs beside each other, or the taps of its filter's gradient, come to their inputs.
enum Kernel {
  kScalars,  // one output at a time
  kApart,    // each loads its own
  kSliding,  // NHWC at horizontal stride 1: neighbours share them, in a window that slides along the row
};

constexpr int vector_of(int size) { return 16 / size; }
// Outputs of a thread beside each other.
constexpr int outputs_of(int size) { return kSums / vector_of(size); }
// Bytes that a tap of a block's channels takes in shared memory.
constexpr int kTapBytes = kVectors * 16 + kPad;

// Taps of a thread of the filter's gradient beside each other, and rows of them.
constexpr int taps_across(int kernel_w) { return kernel_w <= 8 ? 8 : 16; }
constexpr int taps_down(int kernel_w) { return kSums / taps_across(kernel_w); }

// A row's outputs in groups of neighbours: at stride 1 those that are `step`, the dilation, apart share inputs, so the
// residues of the dilation are apart.
struct Row {
  int step, residues, groups;
  Row(int64_t width, int step, int outputs)
      : step(step),
        residues(int(width < step ? width : step)),
        groups(residues * int(ceil_div(ceil_div(width, step), outputs))) {}
};

}  // namespace rkl::cuda::general
