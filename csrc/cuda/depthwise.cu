// Depthwise convolution on a GPU: which kernel serves a call, and the second stage of the filter's gradient.
#include <utility>

#include "cuda/add_parts.cuh"
#include "cuda/depthwise.h"
#include "cuda/element.cuh"
#include "cuda/kernels.h"

namespace rkl::cuda {
namespace {

// Where a sum of the filter's gradient goes: partial is (parts, channels, taps + 1) or (parts, taps + 1, channels),
// with the bias's gradient as the last tap.
template <class T>
struct FilterGrad {
  T *dweight, *dbias;
  int64_t channels;
  int taps;
  bool channels_inside;

  __device__ T* operator()(int64_t i) const {
    const int64_t inside = channels_inside ? channels : taps + 1, outer = i / inside, inner = i - outer * inside;
    const int64_t tap = channels_inside ? outer : inner, c = channels_inside ? inner : outer;
    if (tap < taps) return dweight ? dweight + c * taps + tap : nullptr;
    return dbias ? dbias + c : nullptr;
  }
};

// Parts of the batch whose sums are made apart: enough to fill the GPU, few enough for their sums to be small beside
// the images, and a multiple of the strips that an NHWC map is cut into. And whether a part's sums have the channels
// side by side: in NHWC, but for the tensor cores' kernel, where a warp has one channel.
struct Parts {
  int count;
  bool channels_inside;
};

Parts parts_of(const Conv2d& g, Dtype dtype) {
  if (const int parts = weight_grad_toeplitz_parts(g, dtype)) return {parts, false};
  constexpr int64_t kLeastPixels = 256;  // of a part
  const int64_t taps = g.kernel_h * g.kernel_w, least = kLeastPixels < 8 * taps ? 8 * taps : kLeastPixels;
  const int64_t strips = g.nhwc ? ceil_div(g.out_w, kStripWidth) : 1;
  const int64_t channel_blocks = g.nhwc ? ceil_div(g.channels, 64) : g.channels;
  const int64_t most = ceil_div(g.batch * g.out_h * g.out_w, least);
  const int64_t parts = ceil_div(blocks_wanted(), channel_blocks);
  return {int(ceil_div(parts < most ? parts : most, strips) * strips), g.nhwc};
}

using K = DepthwiseKernel;

K convolve(const Depthwise& a, Dtype dtype, cudaStream_t stream) {
  if (depthwise_nhwc(a, dtype, stream)) return K::nhwc;
  if (depthwise_nchw(a, dtype, stream)) return K::nchw;
  if (depthwise_toeplitz(a, dtype, stream)) return K::tensor_cores;
  if (!a.only_asked) depthwise_general(a, false, dtype, stream);
  return K::general;
}

// At stride 1 the gradient by the input is itself a convolution, of the gradient with the flipped filter.
Depthwise stride1_grad(Conv2d g, const void* grad, const void* weight, void* dx) {
  std::swap(g.in_h, g.out_h);
  std::swap(g.in_w, g.out_w);
  g.padding_h =
      g.dilation_h * (g.kernel_h - 1) - g.padding_h;  // below zero where the padding was wider than the filter
  g.padding_w = g.dilation_w * (g.kernel_w - 1) - g.padding_w;
  return {g, grad, weight, nullptr, dx, true};
}

K input_grad(const Conv2d& g, const void* grad, const void* weight, void* dx, bool only_asked, Dtype dtype,
             cudaStream_t stream) {
  if (g.stride_h == 1 && g.stride_w == 1) {
    Depthwise a = stride1_grad(g, grad, weight, dx);
    a.only_asked = only_asked;
    return convolve(a, dtype, stream);
  }
  const Depthwise a{g, grad, weight, nullptr, dx, false, only_asked};
  if (depthwise_nhwc_stride2_grad(a, dtype, stream)) return K::nhwc;
  if (depthwise_nchw_stride2_grad(a, dtype, stream)) return K::nchw;
  if (!only_asked) depthwise_general(a, true, dtype, stream);
  return K::general;
}

// The first stage of the filter's gradient.
K weight_grad(const WeightGrad& a, Dtype dtype, cudaStream_t stream) {
  if (weight_grad_nhwc(a, dtype, stream)) return K::nhwc;
  if (weight_grad_nchw(a, dtype, stream)) return K::nchw;
  if (weight_grad_toeplitz(a, dtype, stream)) return K::tensor_cores;
  if (!a.only_asked) weight_grad_general(a, dtype, stream);
  return K::general;
}

WeightGrad weight_grad_of(const Conv2d& g, const void* grad, const void* x, float* workspace, bool with_bias,
                          Dtype dtype) {
  const Parts parts = parts_of(g, dtype);
  return {g, grad, x, workspace, parts.count, with_bias, parts.channels_inside};
}

}  // namespace

void depthwise(const Conv2d& g, const void* x, const void* weight, const void* bias, void* y, Dtype dtype,
               cudaStream_t stream) {
  convolve({g, x, weight, bias, y}, dtype, stream);
}

int64_t weight_grad_workspace(const Conv2d& g, Dtype dtype) {
  return int64_t(parts_of(g, dtype).count) * (g.kernel_h * g.kernel_w + 1) * g.channels;
}

void depthwise_backward(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx, void* dweight,
                        void* dbias, float* workspace, Dtype dtype, cudaStream_t stream) {
  const bool of_filter = dweight || dbias;
  const WeightGrad a = of_filter ? weight_grad_of(g, grad, x, workspace, dbias != nullptr, dtype) : WeightGrad{};
  if (!dx || !dweight || !backward_nhwc(a, weight, dx, dtype, stream)) {
    if (dx) input_grad(g, grad, weight, dx, false, dtype, stream);
    if (of_filter) weight_grad(a, dtype, stream);
  }
  if (!of_filter) return;
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int taps = g.kernel_h * g.kernel_w;
    const FilterGrad<T> to{static_cast<T*>(dweight), static_cast<T*>(dbias), g.channels, taps, a.channels_inside};
    launch_add_parts<T>(a.partial, a.parts, (taps + 1) * g.channels, to, stream);
  });
}

DepthwiseKernels depthwise_kernels(const Conv2d& g, Dtype dtype) {
  Depthwise forward{g};
  WeightGrad backward{g};
  forward.only_asked = backward.only_asked = true;
  const K of_forward = convolve(forward, dtype, nullptr);
  if (backward_nhwc(backward, nullptr, nullptr, dtype, nullptr)) return {of_forward, K::one_pass, K::one_pass};
  return {of_forward, input_grad(g, nullptr, nullptr, nullptr, true, dtype, nullptr),
          weight_grad(backward, dtype, nullptr)};
}

}  // namespace rkl::cuda
