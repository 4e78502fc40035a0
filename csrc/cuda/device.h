// The current device's facts, and what a launch may need to ask of it, once.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/plan.h"

namespace rkl::cuda {

// Of the current device; asked once for each.
const Device& current_device();

// Lets a kernel have so many bytes of dynamic shared memory on the current device. The driver is asked once for each
// kernel and device: past 48 KiB a kernel must be allowed what it takes.
void allow_shared(const void* kernel, int bytes);

// Whether all begin at multiples of 16 bytes, as most kernels' loads need.
template <class... P>
bool aligned_16(P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) % 16) == 0;
}

// The most blocks of a grid beside each other, and below each other.
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1, kMostBlocksDown = 65535;

// A launch's grid. Every launch makes its own by this: throws std::runtime_error with the kernel's name where no GPU
// takes so many blocks, instead of letting the numbers wrap.
dim3 grid(const char* kernel, int64_t blocks, int64_t down = 1);

// Throws std::runtime_error with the kernel's name where its launch was refused.
void check_launch(const char* kernel);

}  // namespace rkl::cuda
