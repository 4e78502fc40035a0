// The gradient of the filter of NCHW images, k = 3, 5 or 7, stride 1 or 2: planes in shared memory as in planes.cu.
#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "cuda/planes.cuh"

namespace rkl::cuda {
namespace {

using namespace planes;

constexpr int kGradRows = 4;  // rows of gradients that a thread adds at a time

template <class T>
Cut grad_cut(const Conv2d& g, int kernel, int stride) {
  Cut c = tile_of(g, kGradRows, kernel, stride, sizeof(T));
  c.planes = int(std::min(int64_t(c.planes), g.batch));
  c.pitch = PlaneRuns<T>::pitch_for(input_count(g, c, kernel, stride));
  c.grad_pitch = PlaneRuns<T>::pitch_for(int(std::min(int64_t(c.rows), g.out_h) * g.out_w));
  return c;
}

// A block has one channel and every parts-th tile of it (chunk of rows, group of images); each thread keeps the sums of
// all taps for its columns.
template <class T, int kernel, int stride>
__global__ void __launch_bounds__(kThreads, 2) filter_grad_planes(FilterGrad a, int parts, Cut cut) {
  constexpr int kRows = kGradRows, kInputs = (kRows - 1) * stride + kernel, kTaps = kernel * kernel;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float warp_sums[kWarps][kTaps + 1];
  const Conv2d& g = a.g;
  const int h = int(g.in_h), w = int(g.in_w), out_h = int(g.out_h), out_w = int(g.out_w);
  const int64_t c = blockIdx.x % g.channels, in_image = g.channels * h * w, out_image = g.channels * out_h * out_w;
  const int part = int(blockIdx.x / g.channels);
  const PlaneRuns<T> in{reinterpret_cast<T*>(memory), static_cast<const T*>(a.x), g.batch * in_image, cut.pitch};
  const PlaneRuns<T> out{in.tile + cut.planes * cut.pitch, static_cast<const T*>(a.grad), g.batch * out_image,
                         cut.grad_pitch};
  float sums[kTaps + 1] = {};  // the last one is the bias's

  const int64_t tiles = (g.batch + cut.planes - 1) / cut.planes * cut.chunks;
  for (int64_t t = part; t < tiles; t += parts) {
    const int64_t n = t / cut.chunks * cut.planes;
    const int images = int(min(int64_t(cut.planes), g.batch - n));
    const int y0 = int(t % cut.chunks) * cut.rows, rows = min(cut.rows, out_h - y0);
    const int top = cut.chunks == 1 ? 0 : max(0, y0 * stride - g.padding_h);
    const int bottom = cut.chunks == 1 ? h : min(h, (y0 + rows - 1) * stride - g.padding_h + kernel);
    const int64_t in_begin = n * in_image + (c * h + top) * w, out_begin = n * out_image + (c * out_h + y0) * out_w;
    in.load(in_begin, max(0, bottom - top) * w, images, in_image, threadIdx.x, kThreads);
    out.load(out_begin, rows * out_w, images, out_image, threadIdx.x, kThreads);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    const int groups = (rows + kRows - 1) / kRows;
    for (int item = threadIdx.x; item < images * groups * out_w; item += kThreads) {
      const int x = item % out_w, group = item / out_w % groups, p = item / out_w / groups;
      const int row0 = group * kRows, in_y = (y0 + row0) * stride - g.padding_h, in_x = x * stride - g.padding_w;
      const T* grads = out.run(p, out_begin + p * out_image) + row0 * out_w + x;
      const T* inputs = in.run(p, in_begin + p * in_image) + (in_y - top) * w + in_x;
      float d[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        d[r] = row0 + r < rows ? to_float(grads[r * out_w]) : 0.f;
        sums[kTaps] += d[r];
      }
#pragma unroll
      for (int kw = 0; kw < kernel; ++kw) {
        if (in_x + kw < 0 || in_x + kw >= w) continue;
        float v[kInputs];
#pragma unroll
        for (int j = 0; j < kInputs; ++j)
          v[j] = in_y + j >= top && in_y + j < bottom ? to_float(inputs[j * w + kw]) : 0.f;
#pragma unroll
        for (int kh = 0; kh < kernel; ++kh)
#pragma unroll
          for (int r = 0; r < kRows; ++r) sums[kh * kernel + kw] += d[r] * v[r * stride + kh];
      }
    }
    __syncthreads();  // all threads have read the tile, which the next copies overwrite
  }

  // Adds the sums of lanes, then of warps, in a fixed order.
#pragma unroll
  for (int tap = 0; tap <= kTaps; ++tap) {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) sums[tap] += __shfl_down_sync(0xffffffffu, sums[tap], lanes);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][tap] = sums[tap];
  }
  __syncthreads();
  for (int tap = threadIdx.x; tap <= kTaps; tap += kThreads) {
    float sum = 0.f;
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp][tap];
    a.sum(part, tap, c) = sum;
  }
}

template <class T, int kernel, int stride>
void launch(const FilterGrad& a, const Plan& plan, cudaStream_t stream) {
  const Cut c = grad_cut<T>(a.g, kernel, stride);
  allow_shared(reinterpret_cast<const void*>(&filter_grad_planes<T, kernel, stride>), plan.shared);
  filter_grad_planes<T, kernel, stride>
      <<<grid("filter_grad_planes", plan.blocks), dim3(kThreads), plan.shared, stream>>>(a, plan.parts, c);
  check_launch("filter_grad_planes");
}

}  // namespace

MaybePlan plan_planes_filter_grad(const Conv2d& g, Dtype dtype, const Device& device) {
  Plan plan{Family::planes};
  int64_t shared = 0;
  const bool served = by_kernel(g, [&](auto kernel) {
    by_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      const Cut c = grad_cut<T>(g, kernel, g.stride_h);
      plan.kernel = kernel;
      plan.rows = c.rows;
      plan.threads = kThreads;
      shared = c.planes * (int64_t(c.pitch) + c.grad_pitch) * int64_t(sizeof(T));
    });
  });
  const int sums = kWarps * (plan.kernel * plan.kernel + 1) * int(sizeof(float));  // of static shared memory
  if (!served || shared + sums > device.block_shared) return std::nullopt;
  plan.shared = int(shared);
  plan.parts = filter_grad_parts(g, g.channels, device);
  plan.blocks = g.channels * plan.parts;
  return plan;
}

void launch_planes(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  by_kernel(a.g, [&](auto kernel) {
    by_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      a.g.stride_h == 1 ? launch<T, kernel, 1>(a, plan, stream) : launch<T, kernel, 2>(a, plan, stream);
    });
  });
}

}  // namespace rkl::cuda
