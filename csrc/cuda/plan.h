// How a depthwise convolution is run on a GPU, as a value: chosen on the host from the shape, the type and the device's
// facts, and read by launches, workspaces and rk.explain. Choosing is here, doing in the .cu files. No CUDA in here, so
// that the tests plan for GPUs that they do not have.
#pragma once
#include <cstdint>
#include <optional>

#include "geometry.h"

namespace rkl::cuda {

// What a plan needs to know of a GPU; device.h reads it, once for each device.
struct Device {
  int capability;  // 80, 86, 90, ...
  int multiprocessors;
  int block_shared;            // bytes of shared memory that a block may ask for
  int multiprocessor_shared;   // bytes that all blocks of a multiprocessor have
  int multiprocessor_threads;  // that it has at once
  int multiprocessor_blocks;   // likewise

  // Blocks of so many bytes that a multiprocessor's shared memory has room for: CUDA takes a KiB more of each.
  int blocks_by_shared(int bytes) const { return multiprocessor_shared / (bytes + 1024); }
};

// The kernels, by what they are made of. Each family has its own file, with one function that plans and one that
// launches.
enum class Family : int {
  general,    // any shape, type and layout
  rows,       // 16 bits, NHWC: rows of the image through shared memory, filters as diagonal matrices on tensor cores
  registers,  // NHWC in fp32, and what `rows` declines: a window in registers, without shared memory
  planes,     // NCHW: planes in shared memory
  toeplitz,   // 16 bits, filters of 9 columns and more: a filter's row as a banded matrix on tensor cores
};

// What a kernel makes of a convolution.
enum class Result : int { output, data_grad, filter_grad, both_grads };

// One launch's cut. Each family says what its numbers mean where they are not said here.
struct Plan {
  Family family = Family::general;
  int kernel = 0;      // which of the family's compiled kernels
  int rows = 0;        // output rows of a block's task
  int parts = 1;       // a filter gradient's sums that are made apart, and then added in their order
  int64_t blocks = 0;  // of the grid
  int threads = 0;     // of a block
  int shared = 0;      // bytes of a block
  int64_t steps = 0;   // of `rows`: rows of 32 pixels by 8 channels that warps make, those that fill up included
};

// A backward's launches. With both_grads set, data and filter gradient come from one pass and the other two are empty.
struct BackwardPlan {
  std::optional<Plan> data_grad, filter_grad, both_grads;
  int64_t bias_sums = 0;  // floats of workspace for the bias's gradient, where it is wanted without the filter's

  // Floats of workspace: for each part a sum for each tap, and one for the bias, of each channel.
  int64_t workspace(const Conv2d& g) const {
    const std::optional<Plan>& sums = both_grads ? both_grads : filter_grad;
    return sums ? int64_t(sums->parts) * (g.kernel_h * g.kernel_w + 1) * g.channels : bias_sums;
  }
};

// aligned: whether all images begin at multiples of 16 bytes, which most kernels' loads need. Filters and biases are
// read element by element: a view into one buffer of all parameters may begin anywhere.
// The plan of one result; nothing for both_grads where no family makes both in one pass.
std::optional<Plan> plan_result(Result result, const Conv2d& g, Dtype dtype, bool aligned, const Device& device);
// Whether an NCHW separable convolution takes its images where they lie, where a family of planes makes the depthwise
// step, on any GPU; else transposing them is paid back by NHWC's faster kernels.
bool takes_planes(const Conv2d& g, Dtype dtype, bool backward);
// Whether PyTorch's own convolution, here cuDNN's, makes the output sooner than these kernels. finished: with a bias or
// an activation.
bool left_to_pytorch(const Conv2d& g, Dtype dtype, bool finished);
// Whether NCHW images are transposed into NHWC for a depthwise convolution, and its results back. of_filter: for the
// filter's gradient too. The same on any GPU.
bool transposes(const Conv2d& g, Dtype dtype, bool of_filter);
// Parts of a filter's gradient whose blocks have some channels of a part each: parts enough to fill the GPU, and few
// enough for their sums to be small beside the images.
int filter_grad_parts(const Conv2d& g, int64_t channel_blocks, const Device& device);
Plan plan_forward(const Conv2d& g, Dtype dtype, bool aligned, const Device& device);
// of_filter: with that of the bias or without.
BackwardPlan plan_backward(const Conv2d& g, Dtype dtype, bool aligned, bool of_image, bool of_filter,
                           const Device& device);

// The families' own choices: nothing where the family does not serve the case. g is always the forward convolution.
using MaybePlan = std::optional<Plan>;
MaybePlan plan_rows(Result result, const Conv2d& g, Dtype dtype, const Device& device);
MaybePlan plan_registers(Result result, const Conv2d& g, Dtype dtype, const Device& device);
MaybePlan plan_planes(Result result, const Conv2d& g, Dtype dtype, const Device& device);
MaybePlan plan_toeplitz(Result result, const Conv2d& g, Dtype dtype, bool aligned, const Device& device);
Plan plan_general(Result result, const Conv2d& g, Dtype dtype, bool aligned, const Device& device);

template <class Int>
constexpr Int round_up(Int n, int to) {
  return (n + to - 1) / to * to;
}

// The gradient of a convolution of stride 1 by its image is a convolution too: of the output's gradient, with the
// filter read from its end to its beginning. This is its geometry; the padding is below zero where the forward's was
// wider than the filter.
inline Conv2d data_grad_as_convolution(Conv2d g) {
  const Conv2d f = g;
  g.in_h = f.out_h, g.in_w = f.out_w, g.out_h = f.in_h, g.out_w = f.in_w;
  g.padding_h = f.dilation_h * (f.kernel_h - 1) - f.padding_h;
  g.padding_w = f.dilation_w * (f.kernel_w - 1) - f.padding_w;
  return g;
}

// At stride 2 two rows and two columns of the image's gradient, counted with the padding, meet the same rows and
// columns of the output's: it is a convolution of stride 1 of that, whose outputs are such pairs, with a filter of half
// the size. An even row meets the filter's even rows, an odd one the odd rows; kernel_h, kernel_w are the size they are
// read with.
inline Conv2d stride2_data_grad_as_pairs(Conv2d g, int kernel_h, int kernel_w) {
  const Conv2d f = g;
  g.in_h = f.out_h, g.in_w = f.out_w;
  g.out_h = (f.in_h + f.padding_h + 1) / 2 - f.padding_h / 2;
  g.out_w = (f.in_w + f.padding_w + 1) / 2 - f.padding_w / 2;
  g.padding_h = (kernel_h + 1) / 2 - 1 - f.padding_h / 2;
  g.padding_w = (kernel_w + 1) / 2 - 1 - f.padding_w / 2;
  g.stride_h = g.stride_w = 1;
  return g;
}

}  // namespace rkl::cuda
