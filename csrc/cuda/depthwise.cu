// Depthwise convolution on a GPU: which kernel serves a call, and the second stage of the filter's gradient.
#include <utility>

#include "cuda/depthwise.h"
#include "cuda/element.cuh"
#include "cuda/kernels.h"

namespace rkl::cuda {
namespace {

constexpr int kThreads = 256;

// Adds the parts' sums in their order, so that the result is the same at every run.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_parts(const float* partial, int parts, int taps, int64_t channels, T* dweight, T* dbias) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, size = (taps + 1) * channels;
  if (i >= size) return;
  const int64_t tap = i / channels, c = i - tap * channels;
  if (tap < taps ? !dweight : !dbias) return;
  float sum = 0.f;
#pragma unroll 8
  for (int s = 0; s < parts; ++s) sum += partial[s * size + i];
  (tap < taps ? dweight[c * taps + tap] : dbias[c]) = from_float<T>(sum);
}

// Parts of the batch whose sums are made apart: enough to fill the GPU, few enough for their sums to be small beside
// the images, and a multiple of the strips that an NHWC map is cut into.
int parts_of(const Conv2d& g) {
  constexpr int64_t kLeastPixels = 256;  // of a part
  const int64_t strips = g.nhwc ? ceil_div(g.out_w, kStripWidth) : 1;
  const int64_t channel_blocks = g.nhwc ? ceil_div(g.channels, 64) : g.channels;
  const int64_t most = ceil_div(g.batch * g.out_h * g.out_w, kLeastPixels);
  const int64_t parts = ceil_div(blocks_wanted(), channel_blocks);
  return int(ceil_div(parts < most ? parts : most, strips) * strips);
}

void convolve(const Depthwise& a, Dtype dtype, cudaStream_t stream) {
  if (!depthwise_nhwc(a, dtype, stream) && !depthwise_nchw(a, dtype, stream) && !depthwise_toeplitz(a, dtype, stream))
    depthwise_general(a, false, dtype, stream);
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

}  // namespace

void depthwise(const Conv2d& g, const void* x, const void* weight, const void* bias, void* y, Dtype dtype,
               cudaStream_t stream) {
  convolve({g, x, weight, bias, y}, dtype, stream);
}

void depthwise_input_grad(const Conv2d& g, const void* grad, const void* weight, void* dx, Dtype dtype,
                          cudaStream_t stream) {
  if (g.stride_h == 1 && g.stride_w == 1)
    convolve(stride1_grad(g, grad, weight, dx), dtype, stream);
  else if (const Depthwise a{g, grad, weight, nullptr, dx};
           !depthwise_nhwc_stride2_grad(a, dtype, stream) && !depthwise_nchw_stride2_grad(a, dtype, stream))
    depthwise_general(a, true, dtype, stream);
}

int64_t weight_grad_workspace(const Conv2d& g) {
  return int64_t(parts_of(g)) * (g.kernel_h * g.kernel_w + 1) * g.channels;
}

void depthwise_weight_grad(const Conv2d& g, const void* grad, const void* x, void* dweight, void* dbias,
                           float* workspace, Dtype dtype, cudaStream_t stream) {
  const WeightGrad a{g, grad, x, workspace, parts_of(g), dbias != nullptr};
  if (!weight_grad_nhwc(a, dtype, stream) && !weight_grad_nchw(a, dtype, stream)) weight_grad_general(a, dtype, stream);
  const int taps = g.kernel_h * g.kernel_w;
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    add_parts<T><<<dim3(unsigned(ceil_div((taps + 1) * g.channels, kThreads))), dim3(kThreads), 0, stream>>>(
        workspace, a.parts, taps, g.channels, static_cast<T*>(dweight), static_cast<T*>(dbias));
  });
}

}  // namespace rkl::cuda
