// Runs unmodified CUDA kernels on the CPU for the tests. A .cu file sees this header in place of the GPU.
//
// Every CUDA thread is a fiber with its own stack. The threads of a block take turns on one CPU thread, and blocks run
// one after another. A thread runs until it ends or waits, at a barrier or at a warp's exchange. The emulator chooses
// the order in which threads resume: forward, reverse or shuffled, whole warps at a time, each as far as it can get.
// These schedules are legal on a GPU, and adverse: a missing barrier shows as a NaN from memory not yet written.
//
// rewrite.py turns the three pieces of CUDA that no C++ compiler reads (`__shared__`, `extern __shared__`, `<<<>>>`)
// into calls of functions declared here. Atomics are left out on purpose: the kernels are deterministic.
#pragma once
#define RKL_EMULATOR  // cuda/ptx.cuh takes its functions from warp.h
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#undef __device__
#undef __global__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#define __device__
#define __global__
#define __host__
#define __constant__ static
#define __launch_bounds__(...)
#define __shared__ static_assert(false, "a form of __shared__ that rewrite.py does not know");

#include <functional>
#include <source_location>
#include <string>
#include <tuple>

#include "memory.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

// The order of blocks, of warps in a block and of lanes in a warp, and how late cp.async lands.
enum class Order { forward, reverse, shuffled };
struct Schedule {
  Order order = Order::forward;
  unsigned seed = 0;        // of the shuffle
  bool late_copies = true;  // cp.async lands at the wait that asks for it, or at once: both are legal
  long first_blocks = -1;   // run only this many blocks from the beginning of a grid ...
  long last_blocks = 0;     // ... and this many from its end, for tensors too large to be walked through
  std::string removed;      // the __syncthreads or __syncwarp at this place ("planes.cu:67") does nothing
};
extern Schedule schedule;

// Ends the launch with a std::runtime_error that names kernel, block and thread.
[[noreturn]] void fail(const std::string& what);

// __syncthreads: waits for every thread of the block. All of them must wait at the same line.
void barrier(std::source_location at);

// The most bytes of shared memory that a kernel may be launched with, and may have with its static variables.
struct SharedLimits {
  size_t dynamic, all;
};
SharedLimits shared_limits(const void* kernel);

// A kernel launch: Launch("name", grid, block, shared bytes, stream)(kernel, arguments...).
class Launch {
 public:
  Launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes = 0, cudaStream_t = nullptr)
      : name_(name), grid_(grid), block_(block), shared_bytes_(shared_bytes) {}

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), A&&... arguments) const {
    std::tuple<std::decay_t<P>...> copies(static_cast<P>(arguments)...);  // by value, as on a GPU
    run(reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, copies); });
  }

 private:
  void run(const void* kernel, const std::function<void()>& thread) const;

  const char* name_;
  dim3 grid_, block_;
  size_t shared_bytes_;
};

// `__shared__ T name;`: each declaration has one object in a block. The lambda's type K tells declarations apart.
template <class T, class K>
T& shared(K) {
  static char key;
  return *static_cast<T*>(shared_memory(&key, sizeof(T)));
}

}  // namespace emulator

inline void __syncthreads(std::source_location at = std::source_location::current()) { emulator::barrier(at); }

#include "warp.h"
