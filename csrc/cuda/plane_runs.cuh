// Runs of neighbouring elements of an NCHW tensor in shared memory: rows of a plane, or several whole planes.
//
// Rows of 7 or 19 elements begin at any address, so rows cannot be read in vectors; but rows that follow each other are
// one run, which can, whatever the width. Padding is not stored: who reads the tile looks at the bounds.
#pragma once
#include "cuda/element.cuh"
#include "cuda/ptx.cuh"

namespace rkl::cuda {

template <class T>
struct PlaneRuns {
  static constexpr int V = Vec<T>::size;

  T* tile;  // runs behind each other, `pitch` elements apart
  const T* tensor;
  int64_t all;  // elements of the tensor
  int pitch;

  // Room for a run of so many elements that begins anywhere in a vector.
  __host__ __device__ static int pitch_for(int count) { return (count + 2 * V - 2) / V * V; }

  // Starts the copies of `runs` runs of `count` elements, from element `begin` on and `apart` from one to the next; all
  // threads of the block call it, and commit and wait themselves. Vectors are aligned, so they begin up to V - 1
  // elements early.
  __device__ void load(int64_t begin, int count, int runs, int64_t apart, int thread, int threads) const {
    const int vectors = pitch / V;
    for (int i = thread; i < runs * vectors; i += threads) {
      const int run = runs == 1 ? 0 : i / vectors, at = (i - run * vectors) * V;
      const int64_t first = begin + run * apart, from = first / V * V + at;
      if (from >= first + count) continue;
      const int64_t left = all - from;
      cp_async_16(tile + run * pitch + at, tensor + from, left < V ? int(left) * int(sizeof(T)) : 16);
    }
  }

  // Element `begin` of a run that was loaded from there.
  __device__ const T* run(int number, int64_t begin) const { return tile + number * pitch + int(begin % V); }
};

}  // namespace rkl::cuda
