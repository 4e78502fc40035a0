// Which register kernel serves a convolution, and how it is cut.
#pragma once
#include "cuda/plan.h"
#include "cuda/registers.h"

namespace rkl::cuda::registers {

// How many blocks of kThreads a multiprocessor has at once. This bounds a thread's registers, and is so chosen that
// none is spilled. size: bytes of an element.
constexpr int blocks_of(int kernel, int stride, int size) {
  if (kernel == 3) return (size == 4 ? 5 : 4) - (stride == 2);
  if (kernel == 5) return size == 4 ? 4 : 3;
  return size == 4 ? 3 : 2;
}
constexpr int data_grad_blocks_of(int kernel) { return kernel == 3 ? 5 : kernel == 5 ? 4 : 2; }  // at stride 2
constexpr int filter_grad_blocks_of(int kernel, int stride, int size) {
  if (kernel == 3) return size == 4 && stride == 1 ? 4 : 3;
  if (size == 2) return 2;
  if (kernel == 5) return stride == 1 ? 4 : 3;
  return stride == 1 ? 3 : 2;
}
constexpr int kBothBlocks = 3;

inline int64_t blocks(const Sizes& s, int threads) {
  return s.channel_blocks * ceil_div(s.tasks(), threads / s.vectors);
}

// Channels of a thread: 8 bytes; fewer where the sums would not fit into its registers.
constexpr int channels_of(int kernel, int size) { return size == 2 && kernel == 3 ? 4 : 2; }
constexpr int filter_grad_channels_of(int kernel, int stride, int size) {
  if (size == 4) return kernel > 3 ? 1 : 2;
  return kernel == 3 && stride == 1 ? 4 : 2;
}
constexpr int kBothChannels = 2;

// Neighbouring outputs of a thread in a 3 x 3 convolution whose rows, or their residues of the dilation, have no more.
constexpr int kNarrow = 2;
inline bool is_narrow(const Conv2d& g, int kernel) { return kernel == 3 && ceil_div(g.out_w, g.dilation_w) <= kNarrow; }
constexpr int kPairsAcross = 2;  // pairs of columns that a thread makes of the data gradient at stride 2

}  // namespace rkl::cuda::registers
