// Depthwise convolution of NHWC images in registers, without shared memory for the image: what all kernels share.
//
// A thread makes a few channels (8 bytes of a pixel) of 4 columns and slides down the image. Each row that it loads
// adds to the sums of all output rows that read it; these are in flight in registers. Threads of neighbouring columns
// share inputs in the L1 cache. The next row's loads are issued before this row's arithmetic.
#pragma once
#include "cuda/element.cuh"
#include "cuda/registers.h"

namespace rkl::cuda::registers {

// The word that a thread loads of a pixel: 8 bytes of channels (4, where it must hold fewer sums).
template <class T, int channels>
struct Raw;
template <>
struct Raw<float, 1> {
  using Word = float;
};
template <>
struct Raw<float, 2> {
  using Word = float2;
};
template <>
struct Raw<bf16, 2> {
  using Word = uint32_t;
};
template <>
struct Raw<bf16, 4> {
  using Word = uint2;
};
template <>
struct Raw<f16, 2> {
  using Word = uint32_t;
};
template <>
struct Raw<f16, 4> {
  using Word = uint2;
};

template <class T>
__device__ inline void unpack_word(float from, float (&to)[1]) {
  to[0] = from;
}
template <class T>
__device__ inline void unpack_word(float2 from, float (&to)[2]) {
  to[0] = from.x;
  to[1] = from.y;
}
template <class T>
__device__ inline void unpack_word(uint32_t from, float (&to)[2]) {
  unpack2<T>(from, to[0], to[1]);
}
template <class T>
__device__ inline void unpack_word(uint2 from, float (&to)[4]) {
  unpack2<T>(from.x, to[0], to[1]);
  unpack2<T>(from.y, to[2], to[3]);
}

template <class T>
__device__ inline float pack_word(const float (&from)[1]) {
  return from[0];
}
template <class T>
__device__ inline auto pack_word(const float (&from)[2]) {
  if constexpr (std::is_same_v<T, float>)
    return float2{from[0], from[1]};
  else
    return pack2<T>(from[0], from[1]);
}
template <class T>
__device__ inline uint2 pack_word(const float (&from)[4]) {
  return {pack2<T>(from[0], from[1]), pack2<T>(from[2], from[3])};
}

// A row of an image from a thread's first column and channel on, at every dilation_w-th column. Only the row's address
// takes 64 bits: a column's offset is a multiple of `pixel`, which one instruction adds. The row may begin outside of
// the image, where nothing is read.
template <class T, int channels>
struct Row {
  using Word = typename Raw<T, channels>::Word;

  char* at;
  uint32_t next, pixel;  // bytes to the next row, and from column to column

  // For images of h rows of w pixels. The row begins at (y, x) of image n.
  __device__ Row(const void* tensor, const Sizes& s, int n, int h, int w, int y, int x, int c)
      : at(static_cast<char*>(const_cast<void*>(tensor)) +
           (((int64_t(n) * h + y) * w + x) * s.channels + c) * int64_t(sizeof(T))),
        next(uint32_t(s.dilation_h * w * s.channels) * uint32_t(sizeof(T))),
        pixel(uint32_t(s.dilation_w * s.channels) * uint32_t(sizeof(T))) {}

  __device__ char* column(int q) const { return at + uint64_t(pixel) * uint32_t(q); }
  // Column q if its bit is set, else zero.
  __device__ Word load(uint32_t wanted, int q) const {
    Word v{};
    if (wanted >> q & 1) v = __ldg(reinterpret_cast<const Word*>(column(q)));
    return v;
  }
  // Columns 0 to count - 1. Most threads want all columns, and then need not test each.
  template <int count>
  __device__ void load(uint32_t wanted, Word (&v)[count]) const {
    if (wanted == (1u << count) - 1) {
#pragma unroll
      for (int q = 0; q < count; ++q) v[q] = __ldg(reinterpret_cast<const Word*>(column(q)));
    } else {
#pragma unroll
      for (int q = 0; q < count; ++q) v[q] = load(wanted, q);
    }
  }
  __device__ void store(int q, const float (&v)[channels]) const {
    *reinterpret_cast<Word*>(column(q)) = pack_word<T>(v);
  }
};

// Which of `count` columns from x on lie in a row of `w` pixels, as bits.
template <int count>
__device__ inline uint32_t inside(int x, int dilation, int w) {
  uint32_t bits = 0;
#pragma unroll
  for (int q = 0; q < count; ++q)
    if (x + q * dilation >= 0 && x + q * dilation < w) bits |= 1u << q;
  return bits;
}

// A thread's task: an image, and in it `rows` rows from y on and columns from x on, of one residue of the dilation.
struct Task {
  int n, y, x, rows;  // rows may be none

  __device__ Task(const Sizes& s, int number, int columns) {
    const int across = s.across(), column = number % across, rest = number / across, row = rest % s.down();
    x = column / s.groups + column % s.groups * columns * s.dilation_w;
    const int residue = row / s.chunks, chunk = row % s.chunks;
    y = residue + chunk * s.rows * s.dilation_h;
    rows = min(s.rows, (s.out_h - y + s.dilation_h - 1) / s.dilation_h);
    n = rest / s.down();
  }
};

// The filter of a thread's channels, filled up with zeros to the compiled size. flipped: it is read from its end to its
// beginning. Small filters are in registers, others in shared memory as [tap][channel of the block].
template <class T, int kernel, int channels, bool shared>
struct Filter {
  float v[shared ? 1 : kernel * kernel][channels];
  const float* mine;
  int row;

  __device__ Filter(const Sizes& s, const void* weight, bool flipped, int c, float* memory) {
    const T* from = static_cast<const T*>(weight);
    const auto tap = [&](int channel, int kh, int kw) {
      if (kh >= s.kernel_h || kw >= s.kernel_w || channel >= s.channels) return 0.f;
      const int y = flipped ? s.kernel_h - 1 - kh : kh, x = flipped ? s.kernel_w - 1 - kw : kw;
      return to_float(from[(channel * s.kernel_h + y) * s.kernel_w + x]);
    };
    if constexpr (shared) {
      row = s.vectors * channels;
      const int c0 = c - int(threadIdx.x) * channels;
      for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < kernel * kernel * row; i += blockDim.x * blockDim.y)
        memory[i] = tap(c0 + i % row, i / row / kernel, i / row % kernel);
      mine = memory + threadIdx.x * channels;
      __syncthreads();
    } else {
#pragma unroll
      for (int i = 0; i < kernel * kernel; ++i)
#pragma unroll
        for (int e = 0; e < channels; ++e) v[i][e] = tap(c + e, i / kernel, i % kernel);
    }
  }

  // Reads row kh of the filter.
  __device__ void read(int kh, float (&taps)[kernel][channels]) const {
#pragma unroll
    for (int kw = 0; kw < kernel; ++kw) {
      if constexpr (shared) {
        if constexpr (channels == 2) {
          const float2 both = *reinterpret_cast<const float2*>(mine + (kh * kernel + kw) * row);
          taps[kw][0] = both.x, taps[kw][1] = both.y;
        } else {
#pragma unroll
          for (int e = 0; e < channels; ++e) taps[kw][e] = mine[(kh * kernel + kw) * row + e];
        }
      } else {
#pragma unroll
        for (int e = 0; e < channels; ++e) taps[kw][e] = v[kh * kernel + kw][e];
      }
    }
  }
};

}  // namespace rkl::cuda::registers
