// The few functions of the CUDA runtime that launches call, and the facts of the emulated device.
#include <map>

#include "emulator.h"

namespace emulator {
namespace {

constexpr size_t kDefaultShared = 48 << 10, kMaxShared = 227 << 10;  // opt-in limit of sm_90; sm_80 has 163 KiB

std::map<const void*, size_t> allowed;  // kernel to bytes, by cudaFuncSetAttribute

}  // namespace

SharedLimits shared_limits(const void* kernel) {
  const auto leave = allowed.find(kernel);
  if (leave == allowed.end()) return {kDefaultShared, kDefaultShared};
  return {leave->second, kMaxShared};
}

}  // namespace emulator

extern "C" {
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  if (size_t(value) > emulator::kMaxShared) return cudaErrorInvalidValue;
  emulator::allowed[kernel] = size_t(value);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;  // few, so that grids sized by it stay small
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 163 << 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 164 << 10;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated device"; }
}
