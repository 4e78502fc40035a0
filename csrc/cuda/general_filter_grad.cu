// The filter's and the bias's gradient for every kernel size, stride, dilation and layout.
//
// A thread keeps the sums of some taps of its channel, rows by columns of the filter, and goes along rows of the
// output's gradient. It loads each gradient once for all its sums. At horizontal stride 1 the taps of a row share their
// inputs in a sliding window, so that at each step a thread loads one input of each row of the image.
#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "cuda/general.cuh"

namespace rkl::cuda {
namespace general {
namespace {

// The rows of the image under a thread's taps: `row` elements from one to the next, and a bit for each that exists.
template <class T>
struct ImageRows {
  const T* first;
  int64_t row, pixel;
  uint32_t exist;
};

// A thread's taps, from (kh, kw) on, with their sums.
template <int down, int across>
struct Taps {
  int kh, kw;
  float sums[down][across] = {}, of_bias = 0.f;

  // The rows that output row oy meets. x: the image's first row.
  template <class T>
  __device__ ImageRows<T> rows(const Conv2d& g, int oy, const T* x, const Strides& s) const {
    const int first = oy * g.stride_h - g.padding_h + kh * g.dilation_h;
    uint32_t exist = 0;
#pragma unroll
    for (int i = 0; i < down; ++i) {
      const int iy = first + i * g.dilation_h;
      if (kh + i < g.kernel_h && iy >= 0 && iy < g.in_h) exist |= 1u << i;
    }
    return {x + first * s.row, g.dilation_h * s.row, s.pixel, exist};
  }

  // Loads column `column`, at address `at`, of the rows under the taps; zeros where it does not exist.
  template <class T>
  __device__ static void load(const ImageRows<T>& x, const T* at, int column, int width, float (&to)[down]) {
    const uint32_t inside = unsigned(column) < unsigned(width) ? x.exist : 0;
#pragma unroll
    for (int i = 0; i < down; ++i) to[i] = inside >> i & 1 ? to_float(at[i * x.row]) : 0.f;
  }

  // Adds a row of the gradient: every others-th column from `beside` on.
  template <class T>
  __device__ void gather(const Conv2d& g, const T* grad, const ImageRows<T>& x, int beside, int others) {
    const int64_t step = g.dilation_w * x.pixel;
    for (int ox = beside; ox < g.out_w; ox += others) {
      const float v = to_float(grad[ox * x.pixel]);
      of_bias += v;
      int column = ox * g.stride_w - g.padding_w + kw * g.dilation_w;
      const T* at = x.first + column * x.pixel;
#pragma unroll
      for (int k = 0; k < across; ++k, column += g.dilation_w, at += step) {
        if (kw + k >= g.kernel_w) break;
        float inputs[down];
        load(x, at, column, int(g.in_w), inputs);
#pragma unroll
        for (int i = 0; i < down; ++i) sums[i][k] = fmaf(v, inputs[i], sums[i][k]);
      }
    }
  }

  // Adds a row's columns of one residue of the dilation, one after the other. For each next column an input is loaded
  // in place of the one that leaves the window, and used last.
  template <class T>
  __device__ void slide(const Conv2d& g, const T* grad, const ImageRows<T>& x, int residue) {
    const int width = int(g.in_w), count = (int(g.out_w) - residue + g.dilation_w - 1) / g.dilation_w;
    const int64_t step = g.dilation_w * x.pixel;
    int column = residue - g.padding_w + kw * g.dilation_w;
    const T* at = x.first + column * x.pixel;
    float window[across][down];
    const auto next_column = [&](float (&to)[down]) {
      load(x, at, column, width, to);
      column += g.dilation_w, at += step;
    };
#pragma unroll
    for (int k = 0; k < across; ++k) next_column(window[k]);
    grad += residue * x.pixel;
    float next = to_float(*grad);
    for (int left = count; left;) {
#pragma unroll
      for (int u = 0; u < across; ++u) {
        const float v = next;
        if (left > 1) next = to_float(*(grad += step));
        of_bias += v;
#pragma unroll
        for (int k = 0; k < across; ++k)
#pragma unroll
          for (int i = 0; i < down; ++i) sums[i][k] = fmaf(v, window[(u + k) % across][i], sums[i][k]);
        if (!--left) break;
        next_column(window[u]);
      }
    }
  }
};

// A block makes some taps of a group of channels, over a part of the batch's output rows. Its threads are `lanes`
// channels (one in NCHW) by `others` pixels, or by `others` rows where windows slide. The sums over pixels or rows are
// added in a fixed order.
template <class T, int across, bool slides>
__global__ void __launch_bounds__(kThreads, 2)
    any_filter_grad(FilterGrad a, Divider out_h, int parts, int channels_aside, int channel_blocks) {
  constexpr int down = kSums / across;
  __shared__ float memory[kThreads];
  const Conv2d& g = a.g;
  const int groups_across = (g.kernel_w + across - 1) / across,
            groups = groups_across * ((g.kernel_h + down - 1) / down);
  const int lanes = slides ? kChannelsAside : channels_aside;  // windows slide in NHWC alone
  const int rest = int(blockIdx.x / channel_blocks), group = rest % groups, part = rest / groups;
  const int c = int(blockIdx.x % channel_blocks) * lanes + threadIdx.x % lanes;
  const int beside = threadIdx.x / lanes, others = kThreads / lanes;
  const bool with_bias = a.with_bias && group == 0;
  const Strides sx = strides_of(g, g.in_h, g.in_w), sg = strides_of(g, g.out_h, g.out_w);
  const int64_t rows = g.batch * g.out_h, part_rows = (rows + parts - 1) / parts, first = part * part_rows;
  const int64_t end = first + part_rows < rows ? first + part_rows : rows;
  Taps<down, across> taps{group / groups_across * down, group % groups_across * across};
  for (int64_t r = first + (slides ? beside : 0); c < g.channels && r < end; r += slides ? others : 1) {
    int64_t n = r;
    const int oy = out_h.remainder_of(n);
    const ImageRows<T> x = taps.rows(g, oy, static_cast<const T*>(a.x) + n * sx.image + c * sx.channel, sx);
    if (!x.exist && !with_bias) continue;
    const T* grad = static_cast<const T*>(a.grad) + n * sg.image + c * sg.channel + oy * sg.row;
    if constexpr (slides)
      for (int residue = 0; residue < g.dilation_w && residue < g.out_w; ++residue) taps.slide(g, grad, x, residue);
    else
      taps.gather(g, grad, x, beside, others);
  }

  const auto write = [&](float sum, int tap) {
    __syncthreads();  // the sums before this one have been added
    memory[threadIdx.x] = sum;
    for (int half = others / 2; half; half /= 2) {
      __syncthreads();
      if (beside < half) memory[threadIdx.x] += memory[threadIdx.x + half * lanes];
    }
    if (beside == 0 && c < g.channels) a.sum(part, tap, c) = memory[threadIdx.x];
  };
#pragma unroll
  for (int i = 0; i < down; ++i)
#pragma unroll
    for (int k = 0; k < across; ++k)
      if (taps.kh + i < g.kernel_h && taps.kw + k < g.kernel_w)
        write(taps.sums[i][k], (taps.kh + i) * g.kernel_w + taps.kw + k);
  if (with_bias) write(taps.of_bias, g.kernel_h * g.kernel_w);
}

template <class T, int across, bool slides>
void launch(const FilterGrad& a, const Plan& plan, cudaStream_t stream) {
  const int lanes = a.g.nhwc ? kChannelsAside : 1, channel_blocks = int(ceil_div(a.g.channels, lanes));
  any_filter_grad<T, across, slides><<<grid("any_filter_grad", plan.blocks), dim3(kThreads), 0, stream>>>(
      a, Divider(a.g.out_h), plan.parts, lanes, channel_blocks);
  check_launch("any_filter_grad");
}

}  // namespace
}  // namespace general

void launch_general(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool slides = plan.kernel == general::kSliding;
    if (general::taps_across(a.g.kernel_w) == 8)
      return slides ? general::launch<T, 8, true>(a, plan, stream) : general::launch<T, 8, false>(a, plan, stream);
    slides ? general::launch<T, 16, true>(a, plan, stream) : general::launch<T, 16, false>(a, plan, stream);
  });
}

}  // namespace rkl::cuda
