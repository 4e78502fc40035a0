// Rows of an NHWC image in shared memory: the tile that the depthwise kernels slide down an image, filled by cp.async.
#pragma once
#include "cuda/element.cuh"
#include "cuda/ptx.cuh"

namespace rkl::cuda {

// A pixel of a block: 8 vectors of 16 bytes, 128 bytes of neighbouring channels. That is a whole cache line in memory,
// and in shared memory eight threads beside each other read it without bank conflicts.
constexpr int kVectors = 8;

// The newest `capacity` rows of a window that is `width` pixels wide and begins at (top, left) of the image; what lies
// outside of the image is zero. Rows are numbered from the window's top. Called by all threads of a block of
// (kVectors, any, any) threads.
template <class T, int capacity>
struct RowRing {
  using V = Vec<T>;

  V* slots;        // capacity x width x kVectors
  const T* image;  // the image's first pixel at this thread's channels
  bool live;       // whether this thread's channels are within the tensor
  int h, w, width, top, left;
  int64_t channels;  // of the tensor: from pixel to pixel

  static constexpr int bytes(int width) { return capacity * width * kVectors * 16; }

  // Starts the copies of rows first to first + count - 1; the caller commits and waits.
  __device__ void load(int first, int count) const {
    const int groups = blockDim.y * blockDim.z, group = threadIdx.y + blockDim.y * threadIdx.z;
    int row = first, column = group;
    while (true) {
      while (column >= width) {
        column -= width;
        ++row;
      }
      if (row >= first + count) return;
      const int y = top + row, x = left + column;
      const bool inside = live && y >= 0 && y < h && x >= 0 && x < w;
      const T* from = inside ? image + (int64_t(y) * w + x) * channels : image;
      cp_async_16(at(row, column), from, inside ? 16 : 0);
      column += groups;
    }
  }

  // This thread's vector of a pixel.
  __device__ V* at(int row, int column) const {
    return slots + ((row % capacity) * width + column) * kVectors + threadIdx.x;
  }
};

template <class T>
__device__ inline void to_floats(const Vec<T>& v, float (&out)[Vec<T>::size]) {
#pragma unroll
  for (int e = 0; e < Vec<T>::size; ++e) out[e] = to_float(v.v[e]);
}

template <class T>
__device__ inline Vec<T> from_floats(const float (&v)[Vec<T>::size]) {
  Vec<T> out;
#pragma unroll
  for (int e = 0; e < Vec<T>::size; ++e) out.v[e] = from_float<T>(v[e]);
  return out;
}

// The block's filter as [tap][channel] in shared memory, from (channels, taps) in memory, end first where flipped.
template <class T, int taps>
__device__ void load_filter(Vec<T>* filter, const void* weight, int c0, int channels, bool flipped) {
  constexpr int kChannels = kVectors * Vec<T>::size;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const T* from = static_cast<const T*>(weight) + int64_t(c0) * taps;
  for (int i = thread; i < taps * kChannels; i += threads) {
    const int c = i / taps, tap = flipped ? taps - 1 - i % taps : i % taps;
    if (c0 + c < channels) reinterpret_cast<T*>(filter)[tap * kChannels + c] = from[i];
  }
}

}  // namespace rkl::cuda
