// Depthwise convolution of NCHW images, k = 3, 5 or 7, stride 1 or 2, and its data gradient.
//
// A block copies rows of a plane (several whole planes where they are small) into shared memory as one run.
// Neighbouring threads make neighbouring columns, so shared memory is read without bank conflicts. Each thread makes
// several rows, which share the column of inputs that it has read.
#include "cuda/activation.cuh"
#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "cuda/planes.cuh"

namespace rkl::cuda {
namespace {

using namespace planes;

template <int kernel, int stride>
struct Column {
  static constexpr int kRows = kernel == 7 && stride == 1 ? 8 : 4;  // outputs of a thread, below each other
  static constexpr int kInputs = (kRows - 1) * stride + kernel;
};

constexpr int kPairRows = 4;  // pairs of rows that a thread of stride 2's data gradient makes

// How a convolution is cut.
template <class T>
Cut cut(const Conv2d& g, int thread_rows, int kernel, int stride) {
  Cut c = tile_of(g, thread_rows, kernel, stride, sizeof(T));
  c.pitch = PlaneRuns<T>::pitch_for(c.planes * input_count(g, c, kernel, stride));
  return c;
}

// Bytes of a block's shared memory: 32 bits cannot count them where rows are very wide. taps: those of one filter.
template <class T>
int64_t bytes_of(const Cut& c, int taps) {
  return c.pitch * int64_t(sizeof(T)) + c.planes * taps * int64_t(sizeof(float));
}

// A block's planes, output rows, and the input rows that are in shared memory, as one run.
struct Chunk {
  int64_t plane0;
  int planes, y0, rows, top, bottom;
  int64_t begin;
  int count;

  __device__ Chunk(const Conv2d& g, const Cut& cut, int kernel, int stride)
      : plane0(int64_t(blockIdx.x / cut.chunks) * cut.planes),
        planes(int(min(int64_t(cut.planes), g.batch * g.channels - plane0))),
        y0(int(blockIdx.x % cut.chunks) * cut.rows),
        rows(min(cut.rows, int(g.out_h) - y0)),
        // The input rows that exist; where planes are whole, all rows.
        top(cut.chunks == 1 ? 0 : max(0, y0 * stride - g.padding_h)),
        bottom(cut.chunks == 1 ? int(g.in_h) : min(int(g.in_h), (y0 + rows - 1) * stride - g.padding_h + kernel)),
        begin((plane0 * g.in_h + top) * g.in_w),
        count(max(0, int((planes > 1 ? planes * g.in_h : bottom - top) * g.in_w))) {}

  // Copies the inputs and the planes' filters, and waits.
  template <int taps, class T>
  __device__ void load(const Convolution& a, bool flipped, const PlaneRuns<T>& tile, float* filter) const {
    tile.load(begin, count, 1, 0, threadIdx.x, kThreads);
    cp_async_commit();
    for (int i = threadIdx.x; i < planes * taps; i += kThreads) {
      const int tap = i % taps;
      const int64_t c = (plane0 + i / taps) % a.g.channels;
      filter[i] = to_float(static_cast<const T*>(a.weight)[c * taps + (flipped ? taps - 1 - tap : tap)]);
    }
    cp_async_wait<0>();
    __syncthreads();
  }
};

template <class T, int kernel, int stride>
__global__ void __launch_bounds__(kThreads, 2) convolve_planes(Convolution a, bool flipped, Cut cut) {
  using S = Column<kernel, stride>;
  constexpr int kTaps = kernel * kernel;
  extern __shared__ __align__(16) unsigned char memory[];
  const Conv2d& g = a.g;
  const int h = int(g.in_h), w = int(g.in_w), out_h = int(g.out_h), out_w = int(g.out_w);
  const Chunk chunk(g, cut, kernel, stride);
  const auto [plane0, planes, y0, rows, top, bottom, begin, count] = chunk;
  const PlaneRuns<T> tile{reinterpret_cast<T*>(memory), static_cast<const T*>(a.x), g.batch * g.channels * h * w,
                          cut.pitch};
  float* filter = reinterpret_cast<float*>(tile.tile + cut.pitch);  // [plane][tap]
  chunk.load<kTaps>(a, flipped, tile, filter);

  const int groups = (rows + S::kRows - 1) / S::kRows;
  const T* in = tile.run(0, begin);
  for (int item = threadIdx.x; item < planes * groups * out_w; item += kThreads) {
    const int x = item % out_w, group = item / out_w % groups, p = item / out_w / groups;
    const int row0 = y0 + group * S::kRows, in_y = row0 * stride - g.padding_h, in_x = x * stride - g.padding_w;
    const float bias = a.bias ? to_float(static_cast<const T*>(a.bias)[(plane0 + p) % g.channels]) : 0.f;
    float acc[S::kRows];
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) acc[r] = bias;
#pragma unroll
    for (int kw = 0; kw < kernel; ++kw) {
      if (in_x + kw < 0 || in_x + kw >= w) continue;
      const T* column = in + (p * h + in_y - top) * w + in_x + kw;
      float v[S::kInputs];
#pragma unroll
      for (int j = 0; j < S::kInputs; ++j) v[j] = in_y + j >= top && in_y + j < bottom ? to_float(column[j * w]) : 0.f;
#pragma unroll
      for (int kh = 0; kh < kernel; ++kh) {
        const float weight = filter[p * kTaps + kh * kernel + kw];
#pragma unroll
        for (int r = 0; r < S::kRows; ++r) acc[r] += v[r * stride + kh] * weight;
      }
    }
    activate_all<T>(a.act, acc);
    T* y = static_cast<T*>(a.y) + ((plane0 + p) * out_h + row0) * out_w + x;
#pragma unroll
    for (int r = 0; r < S::kRows; ++r)
      if (row0 + r < y0 + rows) y[int64_t(r) * out_w] = from_float<T>(acc[r]);
  }
}

// The data gradient at stride 2 as a convolution of the gradient that makes pairs of rows and columns of dx
// (stride2_data_grad_as_pairs in plan.h): a.g is that convolution, and has four outputs at each place. image: the
// forward convolution, whose in_h and in_w are dx's size.
template <class T, int kernel>
__global__ void __launch_bounds__(kThreads, 2) stride2_grad_planes(Convolution a, Conv2d image, Cut cut) {
  constexpr int kTaps = kernel * kernel, kHalf = (kernel + 1) / 2, kInputs = kPairRows + kHalf - 1;
  extern __shared__ __align__(16) unsigned char memory[];
  const Conv2d& pairs = a.g;
  const int h = int(pairs.in_h), w = int(pairs.in_w), across = int(pairs.out_w);
  const Chunk chunk(pairs, cut, kHalf, 1);
  const auto [plane0, planes, y0, rows, top, bottom, begin, count] = chunk;
  const PlaneRuns<T> tile{reinterpret_cast<T*>(memory), static_cast<const T*>(a.x),
                          pairs.batch * pairs.channels * h * w, cut.pitch};
  float* filter = reinterpret_cast<float*>(tile.tile + cut.pitch);  // [plane][tap]
  chunk.load<kTaps>(a, false, tile, filter);

  const int groups = (rows + kPairRows - 1) / kPairRows;
  const T* in = tile.run(0, begin);
  for (int item = threadIdx.x; item < planes * groups * across; item += kThreads) {
    const int x = item % across, group = item / across % groups, p = item / across / groups;
    const int row0 = y0 + group * kPairRows, in_y = row0 - pairs.padding_h, in_x = x - pairs.padding_w;
    float acc[kPairRows][2][2] = {};  // [pair of rows][odd row][odd column]
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {  // from the window's left: the last taps come first
      if (in_x + j < 0 || in_x + j >= w) continue;
      const T* column = in + (p * h + in_y - top) * w + in_x + j;
      float v[kInputs];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) v[i] = in_y + i >= top && in_y + i < bottom ? to_float(column[i * w]) : 0.f;
#pragma unroll
      for (int kh = 0; kh < kernel; ++kh)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int kw = 2 * (kHalf - 1 - j) + odd;
          if (kw >= kernel) continue;
          const float weight = filter[p * kTaps + kh * kernel + kw];
#pragma unroll
          for (int r = 0; r < kPairRows; ++r) acc[r][kh % 2][odd] += v[r + kHalf - 1 - kh / 2] * weight;
        }
    }
    T* plane = static_cast<T*>(a.y) + (plane0 + p) * image.in_h * image.in_w;
#pragma unroll
    for (int r = 0; r < 2 * kPairRows; ++r) {
      const int y = 2 * (image.padding_h / 2 + row0) + r - image.padding_h;
      if (y < 0 || y >= image.in_h || row0 + r / 2 >= y0 + rows) continue;
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int column = 2 * (image.padding_w / 2 + x) + odd - image.padding_w;
        if (column >= 0 && column < image.in_w)
          plane[int64_t(y) * image.in_w + column] = from_float<T>(acc[r / 2][r % 2][odd]);
      }
    }
  }
}

template <class T, int kernel, int stride>
Cut cut_of(Result result, const Conv2d& g) {
  if (result == Result::data_grad && stride == 2)
    return cut<T>(stride2_data_grad_as_pairs(g, kernel, kernel), kPairRows, (kernel + 1) / 2, 1);
  return cut<T>(result == Result::output ? g : data_grad_as_convolution(g), Column<kernel, stride>::kRows, kernel,
                stride);
}

template <class T, int kernel, int stride>
void launch(Result result, const Convolution& a, const Plan& plan, cudaStream_t stream) {
  const Cut c = cut_of<T, kernel, stride>(result, a.g);
  Convolution b = a;
  if constexpr (stride == 2) {
    if (result == Result::data_grad) {
      b.g = stride2_data_grad_as_pairs(a.g, kernel, kernel);
      allow_shared(reinterpret_cast<const void*>(&stride2_grad_planes<T, kernel>), plan.shared);
      stride2_grad_planes<T, kernel>
          <<<grid("stride2_grad_planes", plan.blocks), dim3(kThreads), plan.shared, stream>>>(b, a.g, c);
      check_launch("stride2_grad_planes");
      return;
    }
  }
  const bool flipped = result == Result::data_grad;
  if (flipped) b.g = data_grad_as_convolution(a.g);
  allow_shared(reinterpret_cast<const void*>(&convolve_planes<T, kernel, stride>), plan.shared);
  convolve_planes<T, kernel, stride>
      <<<grid("convolve_planes", plan.blocks), dim3(kThreads), plan.shared, stream>>>(b, flipped, c);
  check_launch("convolve_planes");
}

}  // namespace

// Plan::kernel is the filter's size.
MaybePlan plan_planes(Result result, const Conv2d& g, Dtype dtype, const Device& device) {
  if (result == Result::filter_grad) return plan_planes_filter_grad(g, dtype, device);
  if (result == Result::both_grads) return std::nullopt;
  Plan plan{Family::planes};
  int64_t shared = 0;
  const bool served = by_kernel(g, [&](auto kernel) {
    by_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      const Cut c = g.stride_h == 1 ? cut_of<T, kernel, 1>(result, g) : cut_of<T, kernel, 2>(result, g);
      plan.kernel = kernel;
      plan.rows = c.rows;
      plan.threads = kThreads;
      shared = bytes_of<T>(c, kernel * kernel);
      plan.blocks = ceil_div(g.batch * g.channels, c.planes) * c.chunks;
    });
  });
  if (!served || shared > device.block_shared) return std::nullopt;
  plan.shared = int(shared);
  return plan;
}

void launch_planes(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  by_kernel(a.g, [&](auto kernel) {
    by_type(dtype, [&](auto zero) {
      using T = decltype(zero);
      a.g.stride_h == 1 ? launch<T, kernel, 1>(result, a, plan, stream) : launch<T, kernel, 2>(result, a, plan, stream);
    });
  });
}

}  // namespace rkl::cuda
