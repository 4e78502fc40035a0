// Which of the register kernels serves a convolution, and how it is cut.
#include "cuda/registers_plan.h"

#include <algorithm>

namespace rkl::cuda {
namespace registers {
namespace {

// How many vectors a block has: equal shares, in whole sectors of 4. A sector that two blocks share is written twice:
// 72 vectors took 320 us by 15 a block and take 188 by 16, the last half idle (56 px, 144 channels, fp32, H100).
int vectors_of_block(int vectors, int most) {
  constexpr int kSector = 4;
  if (vectors <= most) return vectors;
  const int each = int(ceil_div(vectors, ceil_div(vectors, most)));
  return int(ceil_div(each, kSector)) * kSector;
}

}  // namespace

Sizes sizes_of(const Conv2d& g, int rows, int columns, int vector, int most) {
  Sizes s{};
  s.batch = int(g.batch), s.channels = int(g.channels);
  s.in_h = int(g.in_h), s.in_w = int(g.in_w), s.out_h = int(g.out_h), s.out_w = int(g.out_w);
  s.kernel_h = g.kernel_h, s.kernel_w = g.kernel_w, s.padding_h = g.padding_h, s.padding_w = g.padding_w;
  s.dilation_h = g.dilation_h, s.dilation_w = g.dilation_w;
  s.residues_h = std::min(s.dilation_h, s.out_h), s.residues_w = std::min(s.dilation_w, s.out_w);
  const int height = int(ceil_div(s.out_h, s.dilation_h)), width = int(ceil_div(s.out_w, s.dilation_w));
  s.rows = std::min(rows, height);
  s.chunks = int(ceil_div(height, s.rows));
  s.groups = int(ceil_div(width, columns));
  const int vectors = int(ceil_div(g.channels, vector));
  s.vectors = vectors_of_block(vectors, most);
  s.channel_blocks = int(ceil_div(vectors, s.vectors));
  return s;
}

namespace {

// The size of the smallest compiled filter that the filter, filled up with zeros, fits into. 0 where there is none, or
// where most of the work would be on zeros.
int compiled_kernel(const Conv2d& g, Dtype dtype) {
  const int size = std::max(g.kernel_h, g.kernel_w), kernel = size <= 3 ? 3 : size <= 5 ? 5 : size <= 7 ? 7 : 0;
  if (kernel * kernel > 3 * g.kernel_h * g.kernel_w) return 0;
  return dtype == Dtype::f32 || kernel == 3 || g.stride_h == 1 ? kernel : 0;
}

// How a kernel is cut: the convolution that it computes, a thread's columns and channels, and the steps that a task
// costs beside those of its rows: for filling its window, and for its beginning.
struct Cut {
  Conv2d g;
  int columns, channels, kernel, extra_steps;
  int64_t at_once;  // blocks that run on the GPU at a time

  Sizes with(int rows) const { return sizes_of(g, rows, columns, channels, vectors_of(kernel)); }
  int height() const { return int(ceil_div(g.out_h, g.dilation_h)); }
};

int threads_of(const Sizes& s) { return kThreads / s.vectors * s.vectors; }

// Calls f with the sizes for each number of chunks that an image's rows may be cut into.
template <class F>
void each_cut(const Cut& cut, F f) {
  int before = 0;
  for (int chunks = 1; chunks <= cut.height(); ++chunks) {
    const Sizes s = cut.with(int(ceil_div(cut.height(), chunks)));
    if (s.rows != before) f(s);
    before = s.rows;
  }
}

// Chooses the rows with which the blocks are done soonest. They run in waves where the GPU does not hold all at once.
void cut_outputs(const Cut& cut, Plan& plan) {
  int64_t least = 0;
  each_cut(cut, [&](const Sizes& s) {
    const int64_t count = blocks(s, threads_of(s));
    const int64_t cost = ceil_div(count, cut.at_once) * (s.rows + cut.extra_steps);
    if (least && cost >= least) return;
    least = cost;
    plan.rows = s.rows;
    plan.threads = threads_of(s);
    plan.blocks = count;
  });
}

// Chooses as many parts as the GPU has blocks at once, but so few that their sums, which are written and read again, do
// not pass an eighth of what is read. Chooses the rows with which the threads' tasks are done soonest.
void cut_gradients(const Cut& cut, int size, Plan& plan) {
  const Conv2d& g = cut.g;
  const int64_t read = size * g.batch * (g.in_h * g.in_w + g.out_h * g.out_w);
  const int64_t affordable = std::max<int64_t>(1, read / (8 * 8 * (g.kernel_h * g.kernel_w + 1)));
  int64_t least = 0;
  each_cut(cut, [&](const Sizes& s) {
    const int64_t threads_down = threads_of(s) / s.vectors, needed = ceil_div(s.tasks(), threads_down);
    const int64_t wanted = std::max<int64_t>(1, cut.at_once / s.channel_blocks);
    const int64_t parts = std::min({wanted, affordable, needed});
    const int64_t cost =
        ceil_div(parts * s.channel_blocks, cut.at_once) * ceil_div(needed, parts) * (s.rows + cut.extra_steps);
    if (least && cost >= least) return;
    least = cost;
    plan.rows = s.rows;
    plan.parts = int(parts);
    plan.threads = threads_of(s);
    plan.blocks = parts * s.channel_blocks;
  });
}

bool serves(Result result, const Conv2d& g, int kernel, int size) {
  // 31 bits must hold the bytes between rows and between columns of a residue, all taps, and the tasks of a batch.
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  const bool plain = g.dilation_h == 1 && g.dilation_w == 1;
  const int64_t row = g.dilation_h * std::max(g.in_w, g.out_w), columns = std::max<int64_t>(row, g.dilation_w);
  if (columns * g.channels * size > kMost || g.channels * g.kernel_h * g.kernel_w > kMost) return false;
  if (g.batch * (std::max(g.in_h, g.out_h) + g.dilation_h) * (std::max(g.in_w, g.out_w) + g.dilation_w) > kMost)
    return false;
  if (!kernel || !g.nhwc || g.channels % channels_of(kernel, size)) return false;
  if (g.stride_h != g.stride_w || g.stride_h > 2 || (g.stride_h == 2 && !plain)) return false;
  if (result != Result::both_grads) return true;
  return g.kernel_h == 3 && g.kernel_w == 3 && g.stride_h == 1 && g.padding_h == g.dilation_h &&
         g.padding_w == g.dilation_w;
}

}  // namespace
}  // namespace registers

// Plan::kernel is the compiled filter's size.
MaybePlan plan_registers(Result result, const Conv2d& g, Dtype dtype, const Device& device) {
  using namespace registers;
  const int size = size_of(dtype), kernel = compiled_kernel(g, dtype);
  if (!serves(result, g, kernel, size)) return std::nullopt;
  Plan plan;
  plan.family = Family::registers;
  plan.kernel = kernel;
  const auto cut = [&](const Conv2d& tiled, int columns, int channels, int flight, int blocks_each) {
    constexpr int kBeginning = 2;  // steps that reading the filter and the first row costs
    return Cut{
        tiled, columns, channels, kernel, flight - 1 + kBeginning, int64_t(device.multiprocessors) * blocks_each};
  };
  const int stride = g.stride_h, flight = int(ceil_div(kernel, stride));
  // Cuts the output, or the data gradient where it is a convolution, too.
  const auto cut_convolution = [&](const Conv2d& made) {
    cut_outputs(cut(made, is_narrow(made, kernel) ? kNarrow : kAcross, channels_of(kernel, size), flight,
                    blocks_of(kernel, stride, size)),
                plan);
  };
  switch (result) {
    case Result::output:
      cut_convolution(g);
      break;
    case Result::data_grad:
      if (stride == 2)
        cut_outputs(cut(stride2_data_grad_as_pairs(g, kernel, kernel), kPairsAcross, channels_of(kernel, size),
                        (kernel + 1) / 2, data_grad_blocks_of(kernel)),
                    plan);
      else
        cut_convolution(data_grad_as_convolution(g));
      break;
    case Result::filter_grad:
      cut_gradients(cut(g, kAcross, filter_grad_channels_of(kernel, stride, size), flight,
                        filter_grad_blocks_of(kernel, stride, size)),
                    size, plan);
      break;
    case Result::both_grads:
      cut_gradients(cut(g, kAcross, kBothChannels, 3, kBothBlocks), size, plan);
      break;
  }
  return plan;
}

}  // namespace rkl::cuda
