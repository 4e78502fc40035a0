#include "cpu/separable/matrix.h"

#include <algorithm>

#include "aten.h"
#include "cpu/kernels.h"
#include "cpu/simd/scratch.h"

// MKL's, where torch links it: the calling thread's own number of threads, 0 for the global one; gives the one before.
// Null where torch has another library.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
// OpenMP's, for the calling thread alone while in a parallel region. Null where torch has other threads.
extern "C" __attribute__((weak)) void omp_set_num_threads(int threads);
extern "C" __attribute__((weak)) int omp_get_max_threads();

namespace rkl::cpu {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType scalar_type(Dtype dtype) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  return types[int(dtype)];
}

Tensor view(const Matrix& m) {
  const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
  return torch::stable::from_blob(m.data, {sizes, 2}, {strides, 2}, torch::stable::Device(DeviceType::CPU),
                                  scalar_type(m.dtype));
}

// Whether torch has that operator: one of oneDNN's, so not in every build.
bool has_linear() {
  static const bool has = [] {
    const int64_t sizes[] = {1, 1};
    float one = 1;
    const Tensor x = torch::stable::from_blob(&one, {sizes, 2}, {sizes, 2}, torch::stable::Device(DeviceType::CPU),
                                              ScalarType::Float);
    try {
      linear(x, x);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return has;
}

// In fp32 aten::mm is MKL's, which keeps to AVX2 on processors that are not Intel's: 115 GFLOP/s on a Zen 5 core, where
// oneDNN's inner product runs at 255 once it has begun, which takes 8 us.
bool by_linear(const Matrix& a, const Matrix& b) {
  constexpr int64_t kLeast = 1600000;  // operations whose saving makes up for those 8 us
  // Of a right factor with gaps it has only a loop that takes a thousand times as long.
  if (std::max(b.row_stride, b.column_stride) != (b.row_stride == 1 ? b.rows : b.columns)) return false;
  return a.dtype == Dtype::f32 && 2 * a.rows * a.columns * b.columns >= kLeast && has_linear();
}

bool ask(const char* name) {
  StableIValue answer = 0;
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", &answer, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(answer);
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  const std::optional<std::string> no_algorithm;
  return aten("mkldnn::_linear_pointwise", "", x, w, bias, std::string("none"), std::vector<double>{}, no_algorithm);
}

OneThread::OneThread()
    : mkl_before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0),
      openmp_before_(holds() ? omp_get_max_threads() : 0) {
  if (!holds()) return;
  torch::stable::get_num_threads();  // when a thread first asks, torch sets its own number: that must be done before
  omp_set_num_threads(1);
}

OneThread::~OneThread() {
  if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(mkl_before_);
  if (holds()) omp_set_num_threads(openmp_before_);
}

bool OneThread::holds() { return omp_set_num_threads && omp_get_max_threads; }

Product::Product(const Matrix& a, const Matrix& b, const Matrix& wanted) : matrix_(wanted) {
  if (!by_linear(a, b)) {
    aten("aten::mm", "out", view(a), view(b), view(wanted));
    return;
  }
  // It wants the left factor's rows dense, else torch would copy them, an element at a time.
  const bool dense = a.column_stride == 1 && a.row_stride == a.columns;
  const Scratch rows(dense ? 0 : a.rows * a.columns * sizeof(float));
  if (!dense) kernels(Dtype::f32).transpose(static_cast<const float*>(a.data), rows.as<float>(), a.columns, a.rows);
  const Matrix left = dense ? a : rkl::cpu::matrix(rows.as(), a.dtype, a.rows, a.columns);
  owner_ = linear(view(left), view(transposed(b)));
  matrix_ = rkl::cpu::matrix(owner_->const_data_ptr(), a.dtype, a.rows, b.columns);
}

Dtype factor_type(Dtype dtype) {
  static const bool fast_bf16 = ask("mkldnn::_is_mkldnn_bf16_supported");
#if defined(__aarch64__)
  const bool fast_f16 = false;  // fast, but its sums are in fp16 too: 0.07 off at 15 where 0.04 is to be expected
#else
  static const bool fast_f16 = ask("mkldnn::_is_mkldnn_fp16_supported");
#endif
  const bool fast = dtype == Dtype::bf16 ? fast_bf16 : fast_f16;
  return dtype == Dtype::f32 || fast ? dtype : Dtype::f32;
}

}  // namespace rkl::cpu
