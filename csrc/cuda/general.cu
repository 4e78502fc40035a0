// Depthwise convolution and its data gradient for every kernel size, stride, dilation and layout: for what the faster
// families decline. Neighbouring threads access neighbouring elements; the caches do the rest.
#include "cuda/activation.cuh"
#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "cuda/general.cuh"

namespace rkl::cuda {
namespace general {
namespace {

// What the kernels are given: a convolution or, with `transposed`, a data gradient, where g is the forward convolution.
// flipped: the filter is read from its end to its beginning, which makes the data gradient at stride 1 a convolution.
struct Task : Convolution {
  bool flipped;

  // The index of a tap among the filter's values.
  __device__ int from(int tap) const { return flipped ? g.kernel_h * g.kernel_w - 1 - tap : tap; }
};

// Splits an output's number into its coordinates, in the order of the layout.
struct OutputIndex {
  Divider w, h, channels;

  OutputIndex(const Conv2d& g, bool transposed)
      : w(transposed ? g.in_w : g.out_w), h(transposed ? g.in_h : g.out_h), channels(g.channels) {}
};

// One output a thread, in either layout. The filter is read through the cache.
template <class T, bool transposed>
__global__ void __launch_bounds__(kThreads) any_scalar(Task a, OutputIndex index, int64_t total) {
  const Conv2d& g = a.g;
  int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  T* y = static_cast<T*>(a.y) + i;  // outputs are numbered as they lie in memory
  int c = g.nhwc ? index.channels.remainder_of(i) : 0;
  const int ox = index.w.remainder_of(i), oy = index.h.remainder_of(i);
  if (!g.nhwc) c = index.channels.remainder_of(i);
  const int h = int(transposed ? g.out_h : g.in_h), w = int(transposed ? g.out_w : g.in_w);
  const Strides s = strides_of(g, h, w);
  const T* x = static_cast<const T*>(a.x) + i * s.image + c * s.channel;
  const T* filter = static_cast<const T*>(a.weight) + int64_t(c) * (g.kernel_h * g.kernel_w);
  float acc[1] = {a.bias ? to_float(static_cast<const T*>(a.bias)[c]) : 0.f};
  for (int kh = 0; kh < g.kernel_h; ++kh) {
    const int iy = source<transposed>(oy, kh, g.stride_h, g.padding_h, g.dilation_h, h);
    if (iy < 0) continue;
    for (int kw = 0; kw < g.kernel_w; ++kw) {
      const int ix = source<transposed>(ox, kw, g.stride_w, g.padding_w, g.dilation_w, w);
      if (ix < 0) continue;
      acc[0] += to_float(x[iy * s.row + ix * s.pixel]) * to_float(filter[a.from(kh * g.kernel_w + kw)]);
    }
  }
  activate_all<T>(a.act, acc);
  *y = from_float<T>(acc[0]);
}

// Groups of neighbouring outputs, numbered through all images.
struct Groups {
  Row row;
  Divider across, down;
  int64_t count;

  Groups(const Conv2d& g, bool transposed, int step, int outputs)
      : row(transposed ? g.in_w : g.out_w, step, outputs),
        across(row.groups),
        down(transposed ? g.in_h : g.out_h),
        count(g.batch * down.d * across.d) {}
};

// 16 bytes of a tap's weights.
template <class T, int V>
__device__ inline void read_weights(const unsigned char* from, float (&to)[V]) {
  unpack<T>(*reinterpret_cast<const uint4*>(from), to);
}

// Adds the products of a row of the image and a row of the filter. column: where the first output's first tap reads,
// which may be outside. For each next tap an input is loaded in place of the one that leaves the window, and used last.
template <class T, int outputs, int V>
__device__ void slide(const Conv2d& g, const T* x, int column, int width, int64_t pixel, const unsigned char* weights,
                      float (&sums)[outputs * V]) {
  x += column * pixel;
  const int64_t step = g.dilation_w * pixel;
  float window[outputs][V];
  const auto load = [&](float (&to)[V]) {
    uint4 v{};
    if (unsigned(column) < unsigned(width)) v = __ldg(reinterpret_cast<const uint4*>(x));
    column += g.dilation_w, x += step;
    unpack<T>(v, to);
  };
#pragma unroll
  for (int q = 0; q < outputs; ++q) load(window[q]);
  for (int left = g.kernel_w; left;) {
#pragma unroll
    for (int u = 0; u < outputs; ++u) {
      float weight[V];
      read_weights<T>(weights, weight);
      weights += kTapBytes;
#pragma unroll
      for (int q = 0; q < outputs; ++q)
#pragma unroll
        for (int e = 0; e < V; ++e) sums[q * V + e] = fmaf(window[(u + q) % outputs][e], weight[e], sums[q * V + e]);
      if (!--left) break;
      load(window[u]);
    }
  }
}

// The same where each output loads its own inputs. first: the first output's column.
template <class T, bool transposed, int outputs, int V>
__device__ void gather(const Conv2d& g, const T* x, int first, int width, int64_t pixel, const unsigned char* weights,
                       float (&sums)[outputs * V]) {
  for (int tap = 0; tap < g.kernel_w; ++tap, weights += kTapBytes) {
    float weight[V];
    read_weights<T>(weights, weight);
    // A data gradient divides by the stride. From output to output the remainder counts up, until it is the stride.
    int column = first * g.stride_w - g.padding_w + tap * g.dilation_w, rest = 0;
    if constexpr (transposed) {
      const int reach = first + g.padding_w - tap * g.dilation_w;
      column = reach / g.stride_w, rest = reach % g.stride_w;
      if (rest < 0) rest += g.stride_w, --column;
    }
#pragma unroll
    for (int q = 0; q < outputs; ++q) {
      if (rest == 0 && unsigned(column) < unsigned(width)) {
        float v[V];
        unpack<T>(__ldg(reinterpret_cast<const uint4*>(x + column * pixel)), v);
#pragma unroll
        for (int e = 0; e < V; ++e) sums[q * V + e] = fmaf(v[e], weight[e], sums[q * V + e]);
      }
      if constexpr (!transposed)
        column += g.stride_w;
      else if (++rest == g.stride_w)
        rest = 0, ++column;
    }
  }
}

// NHWC in vectors: a block has 8 vectors of channels and 32 groups of outputs. Rows of the filter are staged in shared
// memory, a few at a time, so that wide filters leave the L1 cache to the image's rows, which the filter's next row
// reads again.
template <class T, bool transposed, bool slides>
__global__ void __launch_bounds__(kThreads, 2) any_vectors(Task a, Groups groups, int channel_blocks, int staged) {
  constexpr int V = vector_of(sizeof(T)), kOutputs = outputs_of(sizeof(T)), kChannels = kVectors * V;
  extern __shared__ __align__(16) unsigned char memory[];  // [tap][channel of the block]
  const Conv2d& g = a.g;
  const int taps = g.kernel_h * g.kernel_w, h = int(transposed ? g.out_h : g.in_h),
            w = int(transposed ? g.out_w : g.in_w), out_w = int(transposed ? g.in_w : g.out_w);
  const int c0 = int(blockIdx.x % channel_blocks) * kChannels, vec = threadIdx.x % kVectors, c = c0 + vec * V;
  int64_t n = int64_t(blockIdx.x / channel_blocks) * (kThreads / kVectors) + threadIdx.x / kVectors;
  const bool works = c < g.channels && n < groups.count;
  const int group = groups.across.remainder_of(n), oy = groups.down.remainder_of(n);
  const int step = groups.row.step, ox = group % groups.row.residues + group / groups.row.residues * step * kOutputs;
  const Strides s = strides_of(g, h, w);
  const T* x = static_cast<const T*>(a.x) + n * s.image + c;
  float sums[kOutputs * V];
#pragma unroll
  for (int i = 0; i < kOutputs * V; ++i)
    sums[i] = works && a.bias ? to_float(static_cast<const T*>(a.bias)[c + i % V]) : 0.f;

  for (int first = 0; first < g.kernel_h; first += staged) {
    const int last = min(first + staged, g.kernel_h), here = (last - first) * g.kernel_w;
    __syncthreads();  // the rows before these have been used
    for (int i = threadIdx.x; i < here * kChannels; i += kThreads) {
      const int channel = i / here, tap = i % here;
      if (c0 + channel < g.channels)
        *reinterpret_cast<T*>(memory + tap * kTapBytes + channel * sizeof(T)) =
            static_cast<const T*>(a.weight)[int64_t(c0 + channel) * taps + a.from(first * g.kernel_w + tap)];
    }
    __syncthreads();
    for (int kh = first; works && kh < last; ++kh) {
      const int iy = source<transposed>(oy, kh, g.stride_h, g.padding_h, g.dilation_h, h);
      if (iy < 0) continue;
      const unsigned char* weights = memory + (kh - first) * g.kernel_w * kTapBytes + vec * 16;
      if constexpr (slides)
        slide<T, kOutputs, V>(g, x + iy * s.row, ox - g.padding_w, w, s.pixel, weights, sums);
      else
        gather<T, transposed, kOutputs, V>(g, x + iy * s.row, ox, w, s.pixel, weights, sums);
    }
  }
  if (!works) return;
  activate_all<T>(a.act, sums);
  T* y = static_cast<T*>(a.y) + ((n * groups.down.d + oy) * out_w + ox) * g.channels + c;
#pragma unroll
  for (int q = 0; q < kOutputs; ++q) {
    float v[V];
#pragma unroll
    for (int e = 0; e < V; ++e) v[e] = sums[q * V + e];
    if (ox + q * step < out_w) *reinterpret_cast<uint4*>(y + int64_t(q) * step * g.channels) = pack<T>(v);
  }
}

template <class T, bool transposed, bool slides>
void launch_vectors(const Task& a, const Plan& plan, cudaStream_t stream) {
  const Groups groups(a.g, transposed, slides ? a.g.dilation_w : 1, outputs_of(sizeof(T)));
  const int channel_blocks = int(ceil_div(a.g.channels, kVectors * vector_of(sizeof(T))));
  allow_shared(reinterpret_cast<const void*>(&any_vectors<T, transposed, slides>), plan.shared);
  any_vectors<T, transposed, slides>
      <<<grid("any_vectors", plan.blocks), dim3(kThreads), plan.shared, stream>>>(a, groups, channel_blocks, plan.rows);
  check_launch("any_vectors");
}

template <class T, bool transposed>
void launch(const Task& a, const Plan& plan, cudaStream_t stream) {
  const Conv2d& g = a.g;
  if (plan.kernel == kSliding) {
    if constexpr (!transposed) launch_vectors<T, false, true>(a, plan, stream);
    return;
  }
  if (plan.kernel == kApart) return launch_vectors<T, transposed, false>(a, plan, stream);
  const int64_t pixels = g.batch * (transposed ? g.in_h * g.in_w : g.out_h * g.out_w);
  any_scalar<T, transposed><<<grid("any_scalar", plan.blocks), dim3(kThreads), 0, stream>>>(
      a, OutputIndex(g, transposed), pixels * g.channels);
  check_launch("any_scalar");
}

}  // namespace
}  // namespace general

void launch_general(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (result == Result::output) return general::launch<T, false>({a, false}, plan, stream);
    if (a.g.stride_h != 1 || a.g.stride_w != 1) return general::launch<T, true>({a, false}, plan, stream);
    general::Task task{a, true};
    task.g = data_grad_as_convolution(a.g);
    general::launch<T, false>(task, plan, stream);
  });
}

}  // namespace rkl::cuda
