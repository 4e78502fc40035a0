// What the separable kernels share: how pixels are cut into tiles, a tile's part of the image in shared memory, and the
// depthwise step from there. Images are NHWC of 16-bit elements; a block takes a tile of output pixels and goes through
// the channels in chunks, or the other way round.
#pragma once
#include "cuda/activation.cuh"
#include "cuda/element.cuh"
#include "cuda/kernels.h"
#include "cuda/ptx.cuh"

namespace rkl::cuda::separable {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// Elements between rows of chunks in shared memory: 16 bytes more than a chunk, so that eight rows of 16 bytes, what
// ldmatrix reads at once, fall into different banks.
template <int channels>
constexpr int kPitch = channels + 8;

// How output pixels are cut into tiles: blocks of an image or, where images are small, of several images at once.
struct Tiling {
  int images, height, width;    // of a tile; the width is a multiple of 4
  int halo_height, halo_width;  // the part of an image that a tile of it reads
  int down, across;             // tiles an image
  int64_t tiles;

  __host__ __device__ int halo() const { return images * halo_height * halo_width; }
};

inline Tiling tiling(const Conv2d& g, int pixels) {
  Tiling t{};
  const int widest = pixels / 8;
  t.width = t.height = 4;
  while (t.width < widest && t.width < g.out_w) t.width *= 2;
  while (t.height * t.width < pixels && t.height < 8 && t.height < g.out_h) t.height *= 2;
  t.images = pixels / (t.height * t.width);
  t.halo_height = (t.height - 1) * g.stride_h + g.kernel_h;
  t.halo_width = (t.width - 1) * g.stride_w + g.kernel_w;
  t.down = int((g.out_h + t.height - 1) / t.height);
  t.across = int((g.out_w + t.width - 1) / t.width);
  t.tiles = (g.batch + t.images - 1) / t.images * t.down * t.across;
  return t;
}

// Where a tile lies: its first image, and its first output row and column.
struct Place {
  int64_t image;
  int row, column;

  __device__ Place(const Tiling& t, int64_t tile)
      : image(tile / (t.down * t.across) * t.images),
        row(int(tile / t.across % t.down) * t.height),
        column(int(tile % t.across) * t.width) {}
};

// Pixels as numbers within the tile's images, counted from its first one; -1 for what is outside: the image's padding,
// what sticks out of an image or out of the batch. Divisions happen here, once a tile, and not for every chunk.
__device__ inline void find_inputs(const Conv2d& g, const Tiling& t, const Place& at, int* pixel) {
  const int halo = t.halo(), an_image = t.halo_height * t.halo_width;
  for (int p = threadIdx.x; p < halo; p += kThreads) {
    const int image = p / an_image, y = at.row * g.stride_h - g.padding_h + p % an_image / t.halo_width,
              x = at.column * g.stride_w - g.padding_w + p % t.halo_width;
    const bool inside = at.image + image < g.batch && y >= 0 && y < g.in_h && x >= 0 && x < g.in_w;
    pixel[p] = inside ? int((image * g.in_h + y) * g.in_w + x) : -1;
  }
}

template <int pixels>
__device__ inline void find_outputs(const Conv2d& g, const Tiling& t, const Place& at, int* pixel) {
  const int m = threadIdx.x;
  if (m >= pixels) return;
  const int image = m / (t.height * t.width), y = at.row + m / t.width % t.height, x = at.column + m % t.width;
  const bool inside = at.image + image < g.batch && y < g.out_h && x < g.out_w;
  pixel[m] = inside ? int((image * g.out_h + y) * g.out_w + x) : -1;
}

// Starts the copies of a chunk of channels of the tile's inputs; what is outside becomes zeros.
template <int chunk, class T>
__device__ inline void copy_halo(const T* x, const int* pixel, int halo, int channel, int channels, T* shared) {
  constexpr int vectors = chunk / 8;
#pragma unroll 1
  for (int v = threadIdx.x; v < halo * vectors; v += kThreads) {
    const int p = pixel[v / vectors], c = channel + v % vectors * 8;
    const bool inside = p >= 0 && c < channels;
    cp_async_16(shared + v / vectors * kPitch<chunk> + v % vectors * 8, inside ? x + int64_t(p) * channels + c : x,
                inside ? 16 : 0);
  }
}

// A chunk's depthwise filters and biases on their way from global memory, where a channel's taps are neighbours, to
// shared memory, where a tap's channels are, in fp32: k * k rows of taps, then the bias. They wait in registers while
// the chunk before is worked on.
template <class T, int k, int chunk>
struct Filters {
  static constexpr int kTaps = chunk * k * k, kAll = kTaps + chunk, kEach = (kAll + kThreads - 1) / kThreads;
  static constexpr int kRow = chunk + 4;  // taps of one channel, stored by neighbouring lanes, spread over 8 banks
  static constexpr int kFloats = (k * k + 1) * kRow;
  T held[kEach];

  __device__ void load(const T* weight, const T* bias, int channel, int channels) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = threadIdx.x + i * kThreads;
      held[i] = from_float<T>(0.f);
      if (e < kTaps) {
        if (channel + e / (k * k) < channels) held[i] = weight[channel * k * k + e];
      } else if (e < kAll && bias && channel + e - kTaps < channels) {
        held[i] = bias[channel + e - kTaps];
      }
    }
  }
  __device__ void store(float* shared) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = threadIdx.x + i * kThreads;
      if (e < kTaps)
        shared[e % (k * k) * kRow + e / (k * k)] = to_float(held[i]);
      else if (e < kAll)
        shared[k * k * kRow + e - kTaps] = to_float(held[i]);
    }
  }
};

// The depthwise outputs of 2 channels of `strip` neighbouring pixels: sum[pixel * 2 + channel], bias included. `halo`
// and `filters` point at the first of the channels; `row` is the halo's width in pixels. Two channels and long strips,
// since loads of 4 bytes a lane fill shared memory's 128 bytes a clock, and taps are used once a pixel of the strip.
template <class T, int k, int stride, int chunk, int strip>
__device__ inline void depthwise_strip(const T* halo, int row, const float* filters, float (&sum)[strip * 2]) {
  using F = Filters<T, k, chunk>;
  using Pair = Vec<float, 2>;
  const Pair bias = *reinterpret_cast<const Pair*>(filters + k * k * F::kRow);
#pragma unroll
  for (int i = 0; i < strip * 2; ++i) sum[i] = bias.v[i % 2];
#pragma unroll 1  // one row of taps at a time in registers
  for (int y = 0; y < k; ++y) {
    Pair taps[k];
#pragma unroll
    for (int x = 0; x < k; ++x) taps[x] = *reinterpret_cast<const Pair*>(filters + (y * k + x) * F::kRow);
#pragma unroll
    for (int column = 0; column < (strip - 1) * stride + k; ++column) {
      const Vec<T, 2> in = *reinterpret_cast<const Vec<T, 2>*>(halo + (y * row + column) * kPitch<chunk>);
#pragma unroll
      for (int pixel = 0; pixel < strip; ++pixel) {
        const int x = column - pixel * stride;
        if (x < 0 || x >= k) continue;
#pragma unroll
        for (int c = 0; c < 2; ++c) sum[pixel * 2 + c] = fmaf(to_float(in.v[c]), taps[x].v[c], sum[pixel * 2 + c]);
      }
    }
  }
}

// Where pixel m of the tile has the first of its inputs in the halo.
template <int stride>
__device__ inline int halo_pixel(const Tiling& t, int m) {
  const int image = m / (t.height * t.width), y = m / t.width % t.height, x = m % t.width;
  return (image * t.halo_height + y * stride) * t.halo_width + x * stride;
}

// A filter's size and stride that the kernels are compiled for.
template <int size, int step>
struct Window {
  static constexpr int k = size, stride = step;
};

// Calls f with the Window of a convolution that the kernels serve.
template <class F>
void by_window(const Conv2d& g, F&& f) {
  switch (g.kernel_h * 10 + g.stride_h) {
    case 31:
      return f(Window<3, 1>{});
    case 32:
      return f(Window<3, 2>{});
    case 51:
      return f(Window<5, 1>{});
    case 52:
      return f(Window<5, 2>{});
    case 71:
      return f(Window<7, 1>{});
    case 72:
      return f(Window<7, 2>{});
  }
}

// Whether the kernels serve a shape at all: what they are compiled for, and 16-byte vectors of 16-bit channels.
inline bool serves(const Conv2d& g, int64_t c_out, Dtype dtype) {
  const bool filter = g.kernel_h == g.kernel_w && (g.kernel_h == 3 || g.kernel_h == 5 || g.kernel_h == 7) &&
                      g.stride_h == g.stride_w && g.stride_h <= 2 && g.dilation_h == 1 && g.dilation_w == 1;
  // A tile counts its pixels in 32 bits, over as many as 8 images.
  const bool counted = g.in_h * g.in_w < (1 << 28) && g.out_h * g.out_w < (1 << 28) && g.channels < (1 << 20);
  return dtype != Dtype::f32 && g.nhwc && filter && counted && g.channels % 8 == 0 && c_out % 8 == 0;
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}
inline int shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// What a GPU does in the time in which it moves one byte, by the data sheets of A100 and H100: multiply-adds in fp32,
// and operations of the tensor cores in 16 bits.
struct Balance {
  double multiply_adds, product;
};
inline Balance balance() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? Balance{10, 295} : Balance{5, 156};
}
// What a product inside a fused kernel takes longer than a library's, in times of an operation: 0.4 and 0.7 of the data
// sheet's rate. Assumed, until measured.
constexpr double kSlowerProduct = 1 / 0.4 - 1 / 0.7;

// Lets a kernel have more than 48 KiB of shared memory.
template <class... P>
void allow_shared(void (*kernel)(P...), int bytes) {
  cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

}  // namespace rkl::cuda::separable
