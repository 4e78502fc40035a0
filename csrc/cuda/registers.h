// How the register kernels (registers.cuh) cut a convolution: the sizes that every thread is told, in 32 bits.
#pragma once
#include "activation.h"
#include "cuda/plan.h"

namespace rkl::cuda::registers {

constexpr int kThreads = 128;  // of a block, at most
constexpr int kAcross = 4;     // outputs of a thread beside each other

// What all threads are told. A dilated convolution is dilation_h x dilation_w convolutions of their own, each of every
// dilation_h-th row and dilation_w-th column, its residue: a thread works on one of them, so that its neighbouring
// outputs share inputs as ever.
struct Sizes {
  int batch, in_h, in_w, out_h, out_w, channels;
  int kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w;
  int residues_h, residues_w;  // that have outputs
  int rows, chunks;            // rows of a thread's task; tasks down a residue
  int groups;                  // of columns, of a residue
  int vectors;                 // of channels, of a block: its threadIdx.x
  int channel_blocks;

  RKL_HOST_DEVICE int across() const { return groups * residues_w; }
  RKL_HOST_DEVICE int down() const { return chunks * residues_h; }
  RKL_HOST_DEVICE int tasks() const { return across() * down() * batch; }  // the plan sees to it that 31 bits hold it
};

// The sizes with tasks of `rows` output rows and of `columns` beside each other; vector:
// channels of a thread; most: vectors of a block.
Sizes sizes_of(const Conv2d& g, int rows, int columns, int vector, int most);

// Vectors of channels that a block has: up to 64 bytes' worth of each pixel or, where taps are in registers, 128.
RKL_HOST_DEVICE constexpr int vectors_of(int kernel) { return kernel == 3 ? 16 : 8; }

}  // namespace rkl::cuda::registers
