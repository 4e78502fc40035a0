// ATen's operators by name, through the dispatcher, where the Stable ABI has no function for them. And the messages of
// ATen's errors, which the Stable ABI drops.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

// PyTorch's message for this thread's last error. Null before PyTorch 2.13.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace rkl {

// The message, where an older PyTorch could not make a new tensor.
#ifdef USE_CUDA
constexpr const char* kNoMemory = "CUDA out of memory. PyTorch wrote to stderr how much was asked for.";
#else
constexpr const char* kNoMemory = "out of memory. PyTorch wrote to stderr how much was asked for.";
#endif

template <auto function>
struct InPyTorchsWords;

// Calls the function. An error of PyTorch's below it (no memory, say) gets PyTorch's own message in place of the name
// of the call that failed.
template <class Result, class... Args, Result (*function)(Args...)>
struct InPyTorchsWords<function> {
  static Result call(Args... args) {
    try {
      return function(std::forward<Args>(args)...);
    } catch (const std::exception& error) {
      const bool wordless = std::string(error.what()).find("API call failed at") != std::string::npos;
      if (!wordless) throw;
      if (torch_exception_get_what_without_backtrace)
        throw std::runtime_error(torch_exception_get_what_without_backtrace());
      if (std::string(error.what()).find("empty") == std::string::npos) throw;
      throw std::runtime_error(kNoMemory);
    }
  }
};

// TORCH_BOX of a function, with PyTorch's messages.
#define RKL_BOX(function) TORCH_BOX((&rkl::InPyTorchsWords<function>::call))

// The tensor that an ATen operator returns.
template <class... Args>
torch::stable::Tensor aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace rkl
