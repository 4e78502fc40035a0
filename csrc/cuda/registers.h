// How the register kernels (registers.cuh) cut a convolution: the sizes that every thread is told, in 32 bits.
#pragma once
#include "activation.h"
#include "cuda/plan.h"

namespace rkl::cuda::registers {

constexpr int kThreads = 128;  // the most threads of a block
constexpr int kAcross = 4;     // neighbouring outputs of a row that a thread makes

// What all threads are given. A dilated convolution is dilation_h x dilation_w separate convolutions, each of every
// dilation_h-th row and dilation_w-th column: a residue of the dilation. A thread works on one residue, so that its
// neighbouring outputs share inputs as they do without dilation.
struct Sizes {
  int batch, in_h, in_w, out_h, out_w, channels;
  int kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w;
  int residues_h, residues_w;  // residues that have outputs
  int rows, chunks;            // rows of a thread's task; tasks down a residue
  int groups;                  // groups of columns in a row of a residue
  int vectors;                 // vectors of channels in a block, one for each threadIdx.x
  int channel_blocks;

  RKL_HOST_DEVICE int across() const { return groups * residues_w; }
  RKL_HOST_DEVICE int down() const { return chunks * residues_h; }
  RKL_HOST_DEVICE int tasks() const { return across() * down() * batch; }  // the plan ensures that 31 bits hold it
};

// The sizes with tasks of `rows` by `columns` outputs. vector: channels of a thread; most: the most vectors of a block.
Sizes sizes_of(const Conv2d& g, int rows, int columns, int vector, int most);

// The most vectors of channels that a block has: 64 bytes of each pixel, or 128 where taps are in registers.
RKL_HOST_DEVICE constexpr int vectors_of(int kernel) { return kernel == 3 ? 16 : 8; }

}  // namespace rkl::cuda::registers
