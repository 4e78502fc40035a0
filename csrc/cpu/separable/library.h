// The library that torch links (oneDNN), where it is better at products than the kernels here.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "geometry.h"

namespace rkl::cpu {

// While one of these lives, the library keeps to the calling thread, and plans its work for one: MKL chooses blocks,
// and so the order of its sums, by torch.set_num_threads even where it runs on one thread, and oneDNN's gradient of a
// convolution waits for as many threads as it was told of.
class OneThread {
 public:
  OneThread();
  ~OneThread();
  OneThread(const OneThread&) = delete;

  // Whether the libraries' threads are OpenMP's, so that this is sure to hold.
  static bool holds();

 private:
  int mkl_before_, openmp_before_;
};

// Calls f(begin, end) for parts of the tasks [0, count) on torch's threads, where the library keeps to the calling
// thread.
template <class F>
void for_tasks(int64_t count, F&& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const OneThread here;
    f(begin, end);
  });
}

// The type that it multiplies factors of this type in: their own, or fp32 where it is slow at it (fp16 without
// instructions for it: 2 GFLOP/s where fp32 has 90).
Dtype factor_type(Dtype dtype);

}  // namespace rkl::cpu
