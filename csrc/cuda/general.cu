// Depthwise convolution and its gradients for every kernel size, stride, dilation and layout: what the fast paths leave
// over. One output a thread and step; neighbours in memory are neighbours in a warp, the caches do the rest.
#include <algorithm>

#include "cuda/activation.cuh"
#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "cuda/element.cuh"

namespace rkl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 8;  // vectors of 16 bytes a pixel and block: 128 bytes, one cache line
enum Kernel { kScalars, kInVectors };

// Where the pixels of an image stand: element (n, c, y, x) is at n * image + c * channel + y * row + x * pixel.
struct Strides {
  int64_t image, channel, row, pixel;
};

__host__ __device__ Strides strides_of(const Conv2d& g, int64_t h, int64_t w) {
  if (g.nhwc) return {h * w * g.channels, 1, w * g.channels, g.channels};
  return {g.channels * h * w, h * w, w, 1};
}

// Division of numbers below 2^52 by a number known at the launch. The machine's own 64-bit division is a routine that
// is called, at the price of spilled registers.
struct Divider {
  int64_t d;
  double inverse;

  explicit Divider(int64_t d) : d(d), inverse(1.0 / double(d)) {}

  // Returns the remainder of i / d; i becomes the quotient.
  __device__ int remainder_of(int64_t& i) const {
    int64_t quotient = int64_t(double(i) * inverse), rest = i - quotient * d;
    const int off = rest < 0 ? -1 : rest >= d ? 1 : 0;  // the rounded inverse is at most one step away
    i = quotient + off;
    return int(rest - off * d);
  }
};

// An output's number taken apart, in the order of its layout.
struct OutputIndex {
  Divider w, h, channels;

  OutputIndex(const Conv2d& g, bool transposed)
      : w(transposed ? g.in_w : g.out_w), h(transposed ? g.in_h : g.out_h), channels(g.channels) {}
};

// The position along one axis that output o and filter tap k read, or -1: outside, or between two strides.
template <bool transposed>
__device__ int source(int o, int k, int stride, int padding, int dilation, int size) {
  if (!transposed) {
    const int i = o * stride - padding + k * dilation;
    return i >= 0 && i < size ? i : -1;
  }
  const int i = o + padding - k * dilation;
  return i >= 0 && i % stride == 0 && i / stride < size ? i / stride : -1;
}

// What the kernels are told: a convolution, or with `transposed` the data gradient of one, g then being the forward's.
// A `flipped` filter is read from its end to its beginning: what makes the data gradient at stride 1 a convolution too.
struct Task : Convolution {
  bool flipped;
};

// acc[e] += the sum over the filter's taps for the channels c + e of image n at output (oy, ox). weight(tap, e) gives
// the filter's value.
template <bool transposed, class T, int V, class Weight>
__device__ void add_taps(const Task& a, int64_t n, int c, int oy, int ox, Weight weight, float (&acc)[V]) {
  const Conv2d& g = a.g;
  const int h = int(transposed ? g.out_h : g.in_h), w = int(transposed ? g.out_w : g.in_w);
  const Strides s = strides_of(g, h, w);
  const T* x = static_cast<const T*>(a.x) + n * s.image + c * s.channel;
  const int last = g.kernel_h * g.kernel_w - 1;
  for (int kh = 0; kh < g.kernel_h; ++kh) {
    const int iy = source<transposed>(oy, kh, g.stride_h, g.padding_h, g.dilation_h, h);
    if (iy < 0) continue;
    for (int kw = 0; kw < g.kernel_w; ++kw) {
      const int ix = source<transposed>(ox, kw, g.stride_w, g.padding_w, g.dilation_w, w);
      if (ix < 0) continue;
      const Vec<T, V> v = *reinterpret_cast<const Vec<T, V>*>(x + iy * s.row + ix * s.pixel);
      const int tap = kh * g.kernel_w + kw, from = a.flipped ? last - tap : tap;
#pragma unroll
      for (int e = 0; e < V; ++e) acc[e] += to_float(v.v[e]) * weight(from, e);
    }
  }
}

// Scalars, either layout; the filter comes through the cache.
template <class T, bool transposed>
__global__ void __launch_bounds__(kThreads) any_scalar(Task a, OutputIndex index, int64_t total) {
  const Conv2d& g = a.g;
  int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  T* y = static_cast<T*>(a.y) + i;  // outputs are numbered as they lie in memory
  int c = g.nhwc ? index.channels.remainder_of(i) : 0;
  const int ox = index.w.remainder_of(i), oy = index.h.remainder_of(i);
  if (!g.nhwc) c = index.channels.remainder_of(i);
  const T* filter = static_cast<const T*>(a.weight) + int64_t(c) * (g.kernel_h * g.kernel_w);
  float acc[1] = {a.bias ? to_float(static_cast<const T*>(a.bias)[c]) : 0.f};
  add_taps<transposed, T>(a, i, c, oy, ox, [=](int tap, int) { return to_float(filter[tap]); }, acc);
  activate_all<T>(a.act, acc);
  *y = from_float<T>(acc[0]);
}

// NHWC in vectors: a block owns 8 vectors of channels, whose filters it keeps in shared memory, and a run of pixels.
template <class T, bool transposed>
__global__ void __launch_bounds__(kThreads, 4)
    any_vectors(Task a, OutputIndex index, int channel_blocks, int64_t pixels, int run) {
  using V = Vec<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  T* filter = reinterpret_cast<T*>(memory);  // [tap][channel of the block]
  const Conv2d& g = a.g;
  constexpr int kChannels = kVectors * V::size;
  const int c0 = int(blockIdx.x % channel_blocks) * kChannels, taps = g.kernel_h * g.kernel_w;
  for (int i = threadIdx.x; i < taps * kChannels; i += kThreads) {
    const int c = c0 + i / taps;
    if (c < g.channels)
      filter[i % taps * kChannels + i / taps] = static_cast<const T*>(a.weight)[int64_t(c0) * taps + i];
  }
  __syncthreads();
  const int vec = threadIdx.x % kVectors, c = c0 + vec * V::size;
  if (c >= g.channels) return;
  const int64_t first = int64_t(blockIdx.x / channel_blocks) * run, end = first + run < pixels ? first + run : pixels;
  for (int64_t pixel = first + threadIdx.x / kVectors; pixel < end; pixel += kThreads / kVectors) {
    int64_t n = pixel;
    const int ox = index.w.remainder_of(n), oy = index.h.remainder_of(n);
    float acc[V::size];
#pragma unroll
    for (int e = 0; e < V::size; ++e) acc[e] = a.bias ? to_float(static_cast<const T*>(a.bias)[c + e]) : 0.f;
    const T* mine = filter + vec * V::size;
    add_taps<transposed, T>(a, n, c, oy, ox, [=](int tap, int e) { return to_float(mine[tap * kChannels + e]); }, acc);
    activate_all<T>(a.act, acc);
    V out;
#pragma unroll
    for (int e = 0; e < V::size; ++e) out.v[e] = from_float<T>(acc[e]);
    *reinterpret_cast<V*>(static_cast<T*>(a.y) + pixel * g.channels + c) = out;
  }
}

// One tap of the filter's gradient for a group of channels, over a part of the batch's output rows. `lanes` threads
// lie along the channels (NHWC) or all along the pixels (NCHW); those along the pixels are added up in a fixed order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    any_filter_grad(FilterGrad a, Divider out_h, int parts, int lanes, int channel_blocks) {
  __shared__ float sums[kThreads];
  const Conv2d& g = a.g;
  const int taps = g.kernel_h * g.kernel_w, others = kThreads / lanes;
  const int channel_block = int(blockIdx.x % channel_blocks), rest = int(blockIdx.x / channel_blocks);
  const int tap = rest % (taps + 1), part = rest / (taps + 1);
  const int c = channel_block * lanes + threadIdx.x % lanes, other = threadIdx.x / lanes;
  const Strides sx = strides_of(g, g.in_h, g.in_w), sg = strides_of(g, g.out_h, g.out_w);
  const int kh = tap / g.kernel_w, kw = tap % g.kernel_w;
  const int64_t rows = g.batch * g.out_h, part_rows = (rows + parts - 1) / parts, first = part * part_rows;
  const int64_t end = first + part_rows < rows ? first + part_rows : rows;
  float sum = 0.f;
  if (c < g.channels && (tap < taps || a.with_bias)) {
    for (int64_t r = first; r < end; ++r) {
      int64_t n = r;
      const int oy = out_h.remainder_of(n);
      const int iy = tap < taps ? source<false>(oy, kh, g.stride_h, g.padding_h, g.dilation_h, int(g.in_h)) : 0;
      if (iy < 0) continue;
      const T* grad = static_cast<const T*>(a.grad) + n * sg.image + c * sg.channel + oy * sg.row;
      const T* x = static_cast<const T*>(a.x) + n * sx.image + c * sx.channel + iy * sx.row;
      for (int ox = other; ox < g.out_w; ox += others) {
        const int ix = source<false>(ox, kw, g.stride_w, g.padding_w, g.dilation_w, int(g.in_w));
        if (tap == taps)
          sum += to_float(grad[ox * sg.pixel]);
        else if (ix >= 0)
          sum += to_float(grad[ox * sg.pixel]) * to_float(x[ix * sx.pixel]);
      }
    }
  }
  sums[threadIdx.x] = sum;
  for (int half = others / 2; half; half /= 2) {
    __syncthreads();
    if (other < half) sums[threadIdx.x] += sums[threadIdx.x + half * lanes];
  }
  if (other == 0 && c < g.channels) a.sum(part, tap, c) = sums[threadIdx.x];
}

constexpr int kChannelsAside = 32;  // of a block of NHWC's filter gradient

bool as_convolution(Result result, const Conv2d& g) {
  return result == Result::output || (g.stride_h == 1 && g.stride_w == 1);
}

int vector_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 8; }

Plan plan_filter_grad(const Conv2d& g, const Device& device) {
  const int64_t channel_blocks = g.nhwc ? ceil_div(g.channels, kChannelsAside) : g.channels;
  const int64_t taps = int64_t(g.kernel_h) * g.kernel_w;
  Plan plan{Family::general};
  plan.parts = filter_grad_parts(g, channel_blocks, device);
  plan.blocks = channel_blocks * (taps + 1) * plan.parts;
  plan.threads = kThreads;
  return plan;
}

template <class T, bool transposed>
void launch(const Task& a, const Plan& plan, cudaStream_t stream) {
  const Conv2d& g = a.g;
  const int64_t pixels = g.batch * (transposed ? g.in_h * g.in_w : g.out_h * g.out_w);
  const OutputIndex index(g, transposed);
  if (plan.kernel == kScalars) {
    any_scalar<T, transposed>
        <<<grid("any_scalar", plan.blocks), dim3(kThreads), 0, stream>>>(a, index, pixels * g.channels);
    check_launch("any_scalar");
    return;
  }
  allow_shared(reinterpret_cast<const void*>(&any_vectors<T, transposed>), plan.shared);
  const int channel_blocks = int(ceil_div(g.channels, kVectors * Vec<T>::size));
  any_vectors<T, transposed><<<grid("any_vectors", plan.blocks), dim3(kThreads), plan.shared, stream>>>(
      a, index, channel_blocks, pixels, plan.rows);
  check_launch("any_vectors");
}

}  // namespace

// kernel: scalars or vectors; rows: pixels of a block's run.
Plan plan_general(Result result, const Conv2d& g, Dtype dtype, bool aligned, const Device& device) {
  if (result == Result::filter_grad) return plan_filter_grad(g, device);
  Plan plan{Family::general};
  plan.threads = kThreads;
  const int64_t pixels = g.batch * (result == Result::output ? g.out_h * g.out_w : g.in_h * g.in_w);
  const int vector = vector_of(dtype);
  const int64_t bytes = int64_t(g.kernel_h) * g.kernel_w * kVectors * 16;
  if (!g.nhwc || g.channels % vector || !aligned || bytes > device.block_shared) {
    plan.kernel = kScalars;
    plan.blocks = ceil_div(pixels * g.channels, kThreads);
    return plan;
  }
  plan.kernel = kInVectors;
  plan.shared = int(bytes);
  const int64_t channel_blocks = ceil_div(g.channels, kVectors * vector);
  // Long runs spread the filter's way into shared memory over many pixels; short ones fill the GPU.
  plan.rows = pixels * channel_blocks > (1 << 20) ? 512 : 64;
  plan.blocks = channel_blocks * ceil_div(pixels, plan.rows);
  return plan;
}

void launch_general(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!as_convolution(result, a.g)) return launch<T, true>({a, false}, plan, stream);
    Task task{a, result == Result::data_grad};
    if (task.flipped) task.g = data_grad_as_convolution(a.g);
    launch<T, false>(task, plan, stream);
  });
}

void launch_general(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int lanes = a.g.nhwc ? kChannelsAside : 1, channel_blocks = int(ceil_div(a.g.channels, lanes));
    any_filter_grad<T><<<grid("any_filter_grad", plan.blocks), dim3(kThreads), 0, stream>>>(
        a, Divider(a.g.out_h), plan.parts, lanes, channel_blocks);
  });
  check_launch("any_filter_grad");
}

}  // namespace rkl::cuda
