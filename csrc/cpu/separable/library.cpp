#include "cpu/separable/library.h"

// MKL's, where torch links it: the calling thread's own number of threads, 0 for the global one; gives the one before.
// Null where torch has another library.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
// OpenMP's, for the calling thread alone while in a parallel region. Null where torch has other threads.
extern "C" __attribute__((weak)) void omp_set_num_threads(int threads);
extern "C" __attribute__((weak)) int omp_get_max_threads();

namespace rkl::cpu {
namespace {

// False where torch has no such library.
bool ask(const char* name) {
  StableIValue answer = 0;
  return !torch_call_dispatcher(name, "", &answer, TORCH_ABI_VERSION) && torch::stable::detail::to<bool>(answer);
}

}  // namespace

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
