// What the kernels of NCHW planes share: rows of a plane, or several whole planes, in shared memory; and how a
// convolution is cut into such pieces.
//
// Rows of 7 or 19 elements begin at any address, so a single row cannot be read in aligned vectors. Successive rows are
// one run of memory, which can be, whatever the width. Padding is not stored: code that reads the tile checks bounds.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cuda/element.cuh"
#include "cuda/plan.h"
#include "cuda/ptx.cuh"

namespace rkl::cuda {

// plan_planes's part for the filter's gradient, which is in a file of its own.
MaybePlan plan_planes_filter_grad(const Conv2d& g, Dtype dtype, const Device& device);

namespace planes {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileBytes = 24 << 10;  // of inputs in a block: four to eight such blocks fit on a multiprocessor

template <class T>
struct PlaneRuns {
  static constexpr int V = Vec<T>::size;

  T* tile;  // runs, `pitch` elements from one to the next
  const T* tensor;
  int64_t all;  // elements of the tensor
  int pitch;

  // How many elements of room a run of `count` elements needs that begins anywhere in a vector.
  __host__ __device__ static int pitch_for(int count) { return (count + 2 * V - 2) / V * V; }

  // Starts the copies of `runs` runs of `count` elements, the first from element `begin` on, each next one `apart`
  // later. All threads of the block call this, then commit and wait. Copies are aligned vectors and may begin V - 1
  // elements early. An empty run, where all rows of a chunk lie in the padding, may begin beyond the tensor.
  __device__ void load(int64_t begin, int count, int runs, int64_t apart, int thread, int threads) const {
    if (!count) return;
    const int vectors = pitch / V;
    for (int i = thread; i < runs * vectors; i += threads) {
      const int run = runs == 1 ? 0 : i / vectors, at = (i - run * vectors) * V;
      const int64_t first = begin + run * apart, from = first / V * V + at;
      if (from >= first + count) continue;
      const int64_t left = all - from;
      cp_async_16(tile + run * pitch + at, tensor + from, left < V ? int(left) * int(sizeof(T)) : 16);
    }
  }

  // The address of the tensor's element `begin`, from which run `number` was loaded.
  __device__ const T* run(int number, int64_t begin) const { return tile + number * pitch + int(begin % V); }
};

// How the work is cut: into chunks of a plane's output rows, or into groups of whole planes (images, for the filter).
struct Cut {
  int rows, chunks, planes;
  int pitch, grad_pitch;  // elements of shared memory for one run of inputs, and of the output's gradient
};

// How many inputs the longest run of a chunk has.
inline int input_count(const Conv2d& g, const Cut& c, int kernel, int stride) {
  const int64_t window = int64_t(c.rows - 1) * stride + kernel;
  return int((c.chunks == 1 ? g.in_h : std::min(window, g.in_h)) * g.in_w);
}

// Chooses rows, chunks and planes. thread_rows: output rows of a thread; a chunk has a multiple of them.
inline Cut tile_of(const Conv2d& g, int thread_rows, int kernel, int stride, int size) {
  const int64_t row_bytes = g.in_w * size, plane_bytes = g.in_h * row_bytes;
  Cut c{};
  c.rows = int(ceil_div(g.out_h, thread_rows)) * thread_rows;
  c.chunks = c.planes = 1;
  if (plane_bytes > kTileBytes) {
    const int64_t fit = (kTileBytes / row_bytes - kernel) / stride / thread_rows * thread_rows;
    c.rows = int(std::max(fit, int64_t(thread_rows)));
    c.chunks = int(ceil_div(g.out_h, c.rows));
    return c;
  }
  // Enough planes for every thread to have a column.
  const int64_t columns = ceil_div(g.out_h, thread_rows) * g.out_w, wanted = ceil_div(kThreads, columns);
  const int64_t fit = kTileBytes / (plane_bytes + 32);
  c.planes = int(std::min(wanted, std::max(fit, int64_t(1))));
  return c;
}

// Calls f with the filter's size as std::integral_constant<int, kernel>. Returns false where no kernel serves, e.g.
// where 31 bits do not count a plane's pixels and the rest of its last vector.
template <class F>
bool by_kernel(const Conv2d& g, F&& f) {
  const bool square = g.kernel_h == g.kernel_w && g.stride_h == g.stride_w && g.dilation_h == 1 && g.dilation_w == 1;
  constexpr int64_t kMostPixels = (int64_t(1) << 31) - 64;
  if (g.nhwc || !square || g.stride_h > 2) return false;
  if (std::max(g.in_h * g.in_w, g.out_h * g.out_w) > kMostPixels) return false;
  switch (g.kernel_h) {
    case 3:
      f(std::integral_constant<int, 3>());
      return true;
    case 5:
      f(std::integral_constant<int, 5>());
      return true;
    case 7:
      f(std::integral_constant<int, 7>());
      return true;
  }
  return false;
}

}  // namespace planes
}  // namespace rkl::cuda
