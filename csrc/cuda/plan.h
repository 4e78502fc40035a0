// A plan says how a depthwise convolution runs on a GPU. The host chooses it from the shape, the type and the device's
// facts. Launches (in the .cu files), workspaces and rk.explain read it. Nothing here uses CUDA, so that the tests can
// plan for GPUs that they do not have.
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
  int multiprocessor_threads;  // the most threads that a multiprocessor has at once
  int multiprocessor_blocks;   // the most blocks

  // How many blocks of `bytes` a multiprocessor's shared memory has room for: CUDA takes a KiB more for each.
  int blocks_by_shared(int bytes) const { return multiprocessor_shared / (bytes + 1024); }
};

// The families of kernels. Each has its own files, with one function that plans and one that launches.
enum class Family : int {
  general,    // any shape, type and layout
  rows,       // 16 bits, NHWC: rows of the image through shared memory, filters as diagonal matrices on tensor cores
  registers,  // NHWC in fp32, and what `rows` declines: a window in registers, without shared memory
  planes,     // NCHW: planes in shared memory
  toeplitz,   // 16 bits, filters of 9 columns and more: a filter's row as a banded matrix on tensor cores
};

// What a kernel makes of a convolution.
enum class Result : int { output, data_grad, filter_grad, both_grads };

// How one result's work is cut. The families say what a number means to them where it is not said here.
struct Plan {
  Family family = Family::general;
  int kernel = 0;      // which of the family's compiled kernels
  int rows = 0;        // output rows of a block's task
  int parts = 1;       // of a filter's gradient: how many sums are made apart and then added in order
  int64_t blocks = 0;  // blocks of the grid
  int threads = 0;     // threads of a block
  int shared = 0;      // bytes of shared memory of a block
  int64_t steps = 0;   // of family `rows`: rows of 32 pixels by 8 channels that warps make, the idle ones included
};

// A backward's launches. With both_grads set, data and filter gradient come from one pass and the other two are empty.
struct BackwardPlan {
  std::optional<Plan> data_grad, filter_grad, both_grads;
  int64_t bias_sums = 0;  // floats of workspace for the bias's gradient, where it is wanted without the filter's

  // Floats of workspace: each part has, for each channel, a sum for each tap and one for the bias.
  int64_t workspace(const Conv2d& g) const {
    const std::optional<Plan>& sums = both_grads ? both_grads : filter_grad;
    return sums ? int64_t(sums->parts) * (g.kernel_h * g.kernel_w + 1) * g.channels : bias_sums;
  }
};

// The plan of one result; nullopt for both_grads where no family makes both in one pass.
// aligned: whether all images begin at multiples of 16 bytes, which most kernels' loads need. Filters and biases need
// not: they may be views into one buffer of all parameters, so kernels read them element by element.
std::optional<Plan> plan_result(Result result, const Conv2d& g, Dtype dtype, bool aligned, const Device& device);
// Whether an NCHW separable convolution reads its images as they are, on any GPU: NCHW has fast kernels for the
// depthwise step, and NHWC's faster kernels would not pay for transposing.
bool takes_planes(const Conv2d& g, Dtype dtype, bool backward);
// Whether PyTorch's own convolution, here cuDNN's, is faster than these kernels. finished: the call has a bias or an
// activation.
bool left_to_pytorch(const Conv2d& g, Dtype dtype, bool finished);
// Whether NCHW images are transposed into NHWC for a depthwise convolution, and its results back. of_filter: for the
// filter's gradient too. The same on any GPU.
bool transposes(const Conv2d& g, Dtype dtype, bool of_filter);
// How many parts a filter's gradient has if a block makes some channels of one part: enough to fill the GPU, but so few
// that their sums are small beside the images.
int filter_grad_parts(const Conv2d& g, int64_t channel_blocks, const Device& device);
Plan plan_forward(const Conv2d& g, Dtype dtype, bool aligned, const Device& device);
// of_filter: the filter's gradient is wanted, with the bias's or without.
BackwardPlan plan_backward(const Conv2d& g, Dtype dtype, bool aligned, bool of_image, bool of_filter,
                           const Device& device);

// The families' own choices: nullopt where the family does not serve the case. g is always the forward convolution.
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

// At stride 1 the image's gradient is a convolution too: of the output's gradient, with the filter read from its end to
// its beginning. This is its geometry. Its padding is negative where the forward's is as wide as the filter or wider.
inline Conv2d data_grad_as_convolution(Conv2d g) {
  const Conv2d f = g;
  g.in_h = f.out_h, g.in_w = f.out_w, g.out_h = f.in_h, g.out_w = f.in_w;
  g.padding_h = f.dilation_h * (f.kernel_h - 1) - f.padding_h;
  g.padding_w = f.dilation_w * (f.kernel_w - 1) - f.padding_w;
  return g;
}

// At stride 2 a pair of rows (or columns) of the image's gradient, counted with the padding, meets the same rows of the
// output's gradient: the even row by the filter's even rows, the odd row by its odd ones. So the image's gradient is a
// stride-1 convolution of the output's gradient with a filter of half the size, whose outputs are such pairs. kernel_h,
// kernel_w: the size of the compiled filter.
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
