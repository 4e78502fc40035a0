// Matrix products by the library that torch links, over raw memory.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "geometry.h"

namespace rkl::cpu {

// A view: element (i, j) lies at data[i * row_stride + j * column_stride]. One of the strides is 1.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t rows, columns, row_stride, column_stride;
};

// A matrix whose rows lie one after another.
inline Matrix matrix(const void* data, Dtype dtype, int64_t rows, int64_t columns) {
  return {const_cast<void*>(data), dtype, rows, columns, columns, 1};
}

inline Matrix transposed(const Matrix& m) {
  return {m.data, m.dtype, m.columns, m.rows, m.column_stride, m.row_stride};
}

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

// x w^T plus the bias by oneDNN's inner product.
torch::stable::Tensor linear(const torch::stable::Tensor& x, const torch::stable::Tensor& w,
                             const std::optional<torch::stable::Tensor>& bias = std::nullopt);

// A product and the memory that holds it: `wanted`, unless the library has only a slower way of writing there.
class Product {
 public:
  // a b. `wanted` must have room for it; where the result lies elsewhere it is left unwritten.
  Product(const Matrix& a, const Matrix& b, const Matrix& wanted);

  const Matrix& matrix() const { return matrix_; }

 private:
  Matrix matrix_;
  std::optional<torch::stable::Tensor> owner_;
};

// The type that factors of this type are multiplied in: their own, or fp32 where the library is slow at it (fp16
// without instructions for it: 2 GFLOP/s where fp32 has 90).
Dtype factor_type(Dtype dtype);

}  // namespace rkl::cpu
