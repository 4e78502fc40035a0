#include "cpu/matrix.h"

#include "aten.h"
#include "cpu/scratch.h"

// MKL's, where torch links it: the calling thread's own number of threads, 0 for the global one; gives the one before.
// Null where torch has another library.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

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

bool ask(const char* name) {
  StableIValue answer = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", &answer, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(answer);
}

}  // namespace

OneThread::OneThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}

OneThread::~OneThread() {
  if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
}

void multiply(const Matrix& a, const Matrix& b, const Matrix& out) {
  aten("aten::mm", "out", view(a), view(b), view(out));
}

void multiply_add(const Matrix& a, const Matrix& b, const Matrix& out) {
  const int64_t size = out.rows * out.columns;
  const Scratch product(size * sizeof(float));
  multiply(a, b, matrix(product.as(), Dtype::f32, out.rows, out.columns));
  float* sum = static_cast<float*>(out.data);
  for (int64_t i = 0; i < size; ++i) sum[i] += product.as<float>()[i];
}

Dtype factor_type(Dtype dtype) {
  static const bool fast_bf16 = ask("mkldnn::_is_mkldnn_bf16_supported");
  static const bool fast_f16 = ask("mkldnn::_is_mkldnn_fp16_supported");
  const bool fast = dtype == Dtype::bf16 ? fast_bf16 : fast_f16;
  return dtype == Dtype::f32 || fast ? dtype : Dtype::f32;
}

}  // namespace rkl::cpu
