// The fused separable convolution by the row pipeline: its compiled kernels and its plan.
#pragma once
#include "cuda/rows.h"

namespace rkl::cuda {

// A compiled kernel, for up to 16 * deep input channels. A warp multiplies 16 pixels by a slice of up to 16 * wide
// output channels. The pointwise filters stay in registers, 4 * deep * wide a thread: reading them from shared memory
// for every row took 115 us where this takes 94 (32 to 64 channels, 112 px, H200).
struct SeparableKernel {
  rows::Kernel window;
  int deep, wide;
};

constexpr SeparableKernel kSeparableKernels[] = {
    {{3, 3, 1, 2, 4, 128}, 2, 2}, {{3, 3, 1, 2, 4, 168}, 2, 4},  {{3, 3, 1, 2, 8, 128}, 4, 1},
    {{3, 3, 1, 2, 8, 128}, 4, 2}, {{3, 3, 1, 2, 16, 128}, 8, 1}, {{3, 3, 2, 3, 4, 128}, 2, 2},
    {{3, 3, 2, 3, 8, 128}, 4, 1}, {{3, 3, 2, 3, 16, 128}, 8, 1}, {{5, 5, 1, 2, 4, 168}, 2, 2},
    {{5, 5, 1, 2, 8, 248}, 4, 1}, {{7, 7, 1, 2, 4, 248}, 2, 2},  {{7, 7, 1, 2, 8, 248}, 4, 1},
};

// Sizes of a launch beside the depthwise step's tiling.
struct SeparableTiling {
  int outputs;                     // output channels
  int hidden_pitch, output_pitch;  // 16-byte pieces between pixels of a depthwise row and of a row of outputs
  int hidden_bytes() const { return rows::kStrip * hidden_pitch * 16; }
  int output_bytes() const { return rows::kStrip * output_pitch * 16; }
};

// A convolution whose inputs are as large as the outputs, so that images_at_once counts the outputs' elements.
inline Conv2d outputs_of(const Conv2d& g, int64_t outputs) {
  Conv2d of = g;
  of.channels = outputs, of.in_h = g.out_h, of.in_w = g.out_w;
  return of;
}

rows::Tiling separable_tiling(const Conv2d& g, const SeparableKernel& kernel, int images, int rows);
SeparableTiling separable_outputs(const SeparableKernel& kernel, int64_t outputs);

}  // namespace rkl::cuda
