// The current device's facts, and what a launch may need to ask of it, once.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/plan.h"

namespace rkl::cuda {

// The current device's facts. The driver is asked once for each device.
const Device& current_device();

// Lets a kernel have `bytes` of dynamic shared memory on the current device: beyond 48 KiB the driver must allow it.
// The driver is asked once for each kernel and device.
void allow_shared(const void* kernel, int bytes);

// Whether all pointers are multiples of 16 bytes, as most kernels' loads need.
template <class... P>
bool aligned_16(P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0;
}

// The most blocks of a grid along x, and along y.
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1, kMostBlocksDown = 65535;

// A launch's grid. Every launch calls this: it throws std::runtime_error with the kernel's name where no GPU takes so
// many blocks, instead of letting the numbers wrap.
dim3 grid(const char* kernel, int64_t blocks, int64_t down = 1);

// Throws std::runtime_error with the kernel's name where its launch was refused.
void check_launch(const char* kernel);

}  // namespace rkl::cuda
