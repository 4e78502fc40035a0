#include "cpu/separable/library.h"

#include <optional>

// MKL's, null where torch links another library. Sets the calling thread's number of threads (0: the global number) and
// returns the number before.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
// OpenMP's, null where torch has other threads. In a parallel region they concern the calling thread alone.
extern "C" __attribute__((weak)) void omp_set_num_threads(int threads);
extern "C" __attribute__((weak)) int omp_get_max_threads();

namespace rkl::cpu {
namespace {

constexpr const char* kFastBf16 = "mkldnn::_is_mkldnn_bf16_supported";

// Calls an operator that returns a bool; none where torch does not have it.
std::optional<bool> ask(const char* name) {
  StableIValue answer = 0;
  if (torch_call_dispatcher(name, "", &answer, TORCH_ABI_VERSION)) return std::nullopt;
  return torch::stable::detail::to<bool>(answer);
}

}  // namespace

OneThread::OneThread()
    : mkl_before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0),
      openmp_before_(holds() ? omp_get_max_threads() : 0) {
  if (!holds()) return;
  torch::stable::get_num_threads();  // torch sets its own number when a thread first asks: before ours
  omp_set_num_threads(1);
}

OneThread::~OneThread() {
  if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(mkl_before_);
  if (holds()) omp_set_num_threads(openmp_before_);
}

bool OneThread::holds() { return omp_set_num_threads && omp_get_max_threads; }

bool has_library() {
  static const bool has = ask(kFastBf16).has_value();
  return has;
}

Dtype factor_type(Dtype dtype) {
  static const bool fast_bf16 = ask(kFastBf16).value_or(false);
#if defined(__aarch64__)
  const bool fast_f16 = false;  // fast, but it sums in fp16: an error of 0.07 at 15, where 0.04 is to be expected
#else
  static const bool fast_f16 = ask("mkldnn::_is_mkldnn_fp16_supported").value_or(false);
#endif
  const bool fast = dtype == Dtype::bf16 ? fast_bf16 : fast_f16;
  return dtype == Dtype::f32 || fast ? dtype : Dtype::f32;
}

}  // namespace rkl::cpu
