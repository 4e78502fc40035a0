// Which kernel family serves a depthwise convolution on a GPU. Host only: the families say what they serve and how.
#include "cuda/plan.h"

#include <algorithm>

#include "cuda/plan_cache.h"

namespace rkl::cuda {
namespace {

// Maps of at most so many columns leave half of each octet of `rows` idle: 4 x 4 pixels took 100 us by rows and 59 by
// registers, with 512 channels and 4096 images on an H200.
constexpr int kNarrowMap = 4;

// The families in the order in which they are preferred; all but `general` may decline.
MaybePlan plan_fast(Result result, const Conv2d& g, Dtype dtype, bool aligned, const Device& device) {
  if (!g.nhwc) {
    if (aligned)
      if (const MaybePlan plan = plan_planes(result, g, dtype, device)) return plan;
    return plan_toeplitz(result, g, dtype, aligned, device);
  }
  if (!aligned) return std::nullopt;
  if (dtype == Dtype::f32) return plan_registers(result, g, dtype, device);
  if (g.in_w <= kNarrowMap && g.out_w <= kNarrowMap && g.kernel_w <= 3)
    if (const MaybePlan plan = plan_registers(result, g, dtype, device)) return plan;
  if (const MaybePlan plan = plan_rows(result, g, dtype, device)) return plan;
  if (result == Result::both_grads) return std::nullopt;  // here two passes by `rows` are faster than one pass
  if (const MaybePlan plan = plan_toeplitz(result, g, dtype, aligned, device)) return plan;
  return plan_registers(result, g, dtype, device);
}

// Nothing is launched where there are no images or no channels, but a caller may ask for the plan. The families cannot
// make it, since they divide by both numbers.
bool is_empty(const Conv2d& g) { return !g.batch || !g.channels; }

}  // namespace

MaybePlan plan_result(Result result, const Conv2d& g, Dtype dtype, bool aligned, const Device& device) {
  if (is_empty(g)) return result == Result::both_grads ? MaybePlan() : Plan{Family::general};
  return remembered(plan_key(g, dtype, aligned, device, int64_t(result)), [&]() -> MaybePlan {
    const MaybePlan plan = plan_fast(result, g, dtype, aligned, device);
    if (plan || result == Result::both_grads) return plan;
    return plan_general(result, g, dtype, aligned, device);
  });
}

namespace {

// The family that serves on any GPU: planned for the smallest shared memory, so that no device need be asked.
Family family_anywhere(Result result, Conv2d g, bool nhwc, Dtype dtype) {
  constexpr Device least{86, 1, 99 << 10, 100 << 10, 1536, 16};
  g.nhwc = nhwc;
  return plan_result(result, g, dtype, true, least)->family;
}

// Whether the library, which in NCHW makes a product for each image, would leave more than a fifth of tiles of 64
// pixels idle. Its own tiles are not known; this rule separates the layers that gain by NHWC on an H200 from those that
// lose. With planes of 16 and of 4 pixels a separable layer took 2.0 ms each, in NHWC 0.8 and 0.3 (512 channels, 4096
// images, fp32). With few images the launches of the transpositions cost too much.
bool wastes_products(const Conv2d& g) {
  constexpr int64_t kTile = 64, kManyImages = 32;
  const int64_t pixels = g.out_h * g.out_w;
  return g.batch >= kManyImages && 5 * pixels < 4 * round_up(pixels, kTile);
}

}  // namespace

// In 16 bits at stride 1 NHWC pays for the transposition (0.15 + 2 x 0.1 ms where the steps in NCHW took 0.53: 240 to
// 80 channels, 14 px, H100). At stride 2 the image is four times the output, and transposing it takes longer than all
// else: forward 71 us by planes and 122 transposed (64 to 128 channels, 32 px, bf16, H200). NHWC's gradients are so
// much faster that transposing pays for them at stride 2, too, in 16 bits (298 against 476 us: 256 to 512 channels, 8
// px), but not in fp32.
bool takes_planes(const Conv2d& g, Dtype dtype, bool backward) {
  const bool pays = backward ? dtype != Dtype::f32 || g.stride_h == 1 : dtype != Dtype::f32 && g.stride_h == 1;
  if (pays || wastes_products(g)) return false;
  return family_anywhere(Result::output, g, false, dtype) != Family::general &&
         family_anywhere(Result::data_grad, g, false, dtype) != Family::general;
}

// Stride 2 to maps of 4 columns or fewer leaves three quarters of a strip's pixels idle, and a register kernel waits
// for its loads: 42 and 56 us (8 and 4 px, bf16, H200), where cuDNN takes 29 and 32. In fp32 cuDNN may use TF32.
// A call with a bias or an activation is not left to cuDNN: PyTorch rounds cuDNN's sums before it applies either in a
// pass of its own. In fp16 a rounded sum may be infinite that the bias would have brought back into range.
bool left_to_pytorch(const Conv2d& g, Dtype dtype, bool finished) {
  constexpr int64_t kNarrow = 4;
  const bool halves = g.stride_h == 2 && g.stride_w == 2 && g.dilation_h == 1 && g.dilation_w == 1;
  return !finished && dtype != Dtype::f32 && g.nhwc && halves && g.kernel_h == 3 && g.kernel_w == 3 &&
         g.out_w <= kNarrow && g.channels % 8 == 0;
}

// Transposing takes two or three more passes over memory. NCHW's general kernels take 5 times as long as NHWC's or more
// (dilation 6 to 18, 33 px, bf16, H100: 1.0 and 0.12 ms forward; for the filter's gradient 15 and 0.15 ms by an earlier
// kernel, which made one tap a block). The kernels of planes take twice as long as NHWC's at 3 x 3, where transposing
// does not pay, and 4 to 9 times at 5 x 5 and more, and for the filter's gradient. In fp32 the two are closer:
// transposing pays for the filter's gradient at 5 x 5 and more (1.08 and 0.23 ms: 240 channels, 14 px, H200) or in rows
// no wider than 32, and for an output where 7 x 7 is wider than the image.
bool transposes(const Conv2d& g, Dtype dtype, bool of_filter) {
  if (g.nhwc) return false;
  const Result result = of_filter ? Result::filter_grad : Result::output;
  const Family planes = family_anywhere(result, g, false, dtype), nhwc = family_anywhere(result, g, true, dtype);
  constexpr int64_t kMany = 32;  // with so many channels the general NHWC kernel moves whole sectors
  if (planes == Family::general) return nhwc != Family::general || g.channels >= kMany;
  if (planes != Family::planes) return false;
  if (nhwc == Family::rows) return of_filter || g.kernel_h >= 5;
  if (nhwc != Family::registers || g.stride_h != 1) return false;
  return of_filter ? g.kernel_h >= 5 || g.in_w <= 32 : g.kernel_h == 7 && g.in_w <= 4;
}

int filter_grad_parts(const Conv2d& g, int64_t channel_blocks, const Device& device) {
  constexpr int64_t kBlocksEach = 8, kLeastPixels = 256;
  const int64_t taps = int64_t(g.kernel_h) * g.kernel_w, least = std::max(kLeastPixels, 8 * taps);
  return int(std::min(ceil_div(kBlocksEach * device.multiprocessors, channel_blocks),
                      ceil_div(g.batch * g.out_h * g.out_w, least)));
}

Plan plan_forward(const Conv2d& g, Dtype dtype, bool aligned, const Device& device) {
  return *plan_result(Result::output, g, dtype, aligned, device);
}

BackwardPlan plan_backward(const Conv2d& g, Dtype dtype, bool aligned, bool of_image, bool of_filter,
                           const Device& device) {
  BackwardPlan plan;
  if (of_image && of_filter) plan.both_grads = plan_result(Result::both_grads, g, dtype, aligned, device);
  if (plan.both_grads) return plan;
  if (of_image) plan.data_grad = plan_result(Result::data_grad, g, dtype, aligned, device);
  if (of_filter) plan.filter_grad = plan_result(Result::filter_grad, g, dtype, aligned, device);
  return plan;
}

}  // namespace rkl::cuda
