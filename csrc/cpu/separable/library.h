// oneDNN, the library that torch links: it serves where it multiplies faster than the kernels here.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "geometry.h"

namespace rkl::cpu {

// While a OneThread lives, MKL and oneDNN run on the calling thread alone and plan for one thread. Else MKL chooses its
// blocks, and so the order of its sums, by torch.set_num_threads even where it runs on one thread, and oneDNN's
// gradient of a convolution waits for as many threads as it was told of.
class OneThread {
 public:
  OneThread();
  ~OneThread();
  OneThread(const OneThread&) = delete;

  // Whether the libraries' threads are OpenMP's. Only then is it sure that the libraries keep to one thread.
  static bool holds();

 private:
  int mkl_before_, openmp_before_;
};

// Whether torch has oneDNN.
bool has_library();

// The type in which oneDNN multiplies factors of this type: their own, or fp32 where it is slow at their own (fp16
// without instructions for it: 2 GFLOP/s where fp32 has 90).
Dtype factor_type(Dtype dtype);

}  // namespace rkl::cpu
