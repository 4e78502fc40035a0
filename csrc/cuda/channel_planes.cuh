// Loads windows of images into shared memory as planes of single channels, which the tensor-core kernels of wide
// filters read. Vectors of channels of an NHWC image are transposed to words of two neighbouring columns.
#pragma once
#include "cuda/element.cuh"
#include "cuda/plan.h"
#include "cuda/ptx.cuh"

namespace rkl::cuda {

// plan_toeplitz's part for the filter's gradient, which is in a file of its own.
MaybePlan plan_toeplitz_filter_grad(const Conv2d& g, Dtype dtype, bool aligned, const Device& device);

// Whether the kernels of wide filters may serve a convolution. Narrower filters have kernels of their own, or too few
// taps to fill a product.
inline bool is_wide(const Conv2d& g, Dtype dtype) {
  constexpr int kNarrowest = 9;
  const bool dense = g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 && g.dilation_w == 1;
  return dtype != Dtype::f32 && g.kernel_w >= kNarrowest && dense && !(g.nhwc && g.channels % 8);
}

union Word {  // two neighbouring columns
  uint32_t bits;
  uint16_t half[2];
};
union Pixel {  // 8 neighbouring channels
  uint4 bits;
  uint16_t half[8];
};

// The same rows and columns of successive images. All rows lie in the image. Columns before the image, and from `end`
// on, are loaded as zeros.
template <class T>
struct Window {
  const T* tensor;
  int64_t channels, h, w;  // of the tensor
  int64_t image;           // the first image
  int images, top, rows, left, columns, end;

  // Loads the block's channels from c0 on, in vectors of 8, to planes + channel * plane + at(image, row, column). The
  // number of columns is even, and `at` is called with even columns alone.
  template <class At>
  __device__ void load_nhwc(int c0, int block_channels, T* planes, int plane, At at) const {
    const int vectors = block_channels / 8, pairs = columns / 2;
#pragma unroll 1
    for (int i = threadIdx.x; i < images * rows * pairs * vectors; i += blockDim.x) {
      const int vector = i % vectors, pair = i / vectors % pairs, row = i / vectors / pairs % rows;
      const int n = i / vectors / pairs / rows, channel = c0 + vector * 8, x = left + 2 * pair;
      Pixel in[2] = {};
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (channel < channels && x + e >= 0 && x + e < end)
          in[e].bits = *reinterpret_cast<const uint4*>(tensor + (((image + n) * h + top + row) * w + x + e) * channels +
                                                       channel);
      T* to = planes + vector * 8 * plane + at(n, row, 2 * pair);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        Word word;
        word.half[0] = in[0].half[e];
        word.half[1] = in[1].half[e];
        *reinterpret_cast<uint32_t*>(to + e * plane) = word.bits;
      }
    }
  }

  // A warp loads one channel to plane + at(image, row, column). in_vectors: left and w must be multiples of 8, `at` is
  // called once for each vector of 8, and the caller waits for the copies.
  template <class At>
  __device__ void load_nchw(int64_t channel, bool in_vectors, T* plane, At at) const {
    const int step = in_vectors ? 8 : 1, across = columns / step;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < images * rows * across; i += 32) {
      const int column = i % across * step, row = i / across % rows, n = i / across / rows, x = left + column;
      const bool inside = x >= 0 && x < end;
      const T* from = tensor + (((image + n) * channels + channel) * h + top + row) * w + (inside ? x : 0);
      T* to = plane + at(n, row, column);
      if (in_vectors)
        cp_async_16(to, from, inside ? 16 : 0);
      else
        *to = inside ? *from : from_float<T>(0.f);
    }
  }
};

}  // namespace rkl::cuda
