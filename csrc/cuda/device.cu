#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/device.h"

namespace rkl::cuda {
namespace {

// Bytes of dynamic shared memory that every kernel may have: 48 KiB, less the static shared memory of a block (1.6 KiB
// at most).
constexpr int kAlwaysAllowed = 46 << 10;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

int current_device_index() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

std::mutex mutex;  // guards the two maps; calls come from many threads
std::map<int, Device> devices;
std::map<std::pair<const void*, int>, int> allowed;  // bytes, for each kernel and device

}  // namespace

const Device& current_device() {
  const int device = current_device_index();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = devices.find(device);
  if (found != devices.end()) return found->second;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  const Device facts{10 * major + minor,
                     attribute(cudaDevAttrMultiProcessorCount, device),
                     attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                     attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                     attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device),
                     attribute(cudaDevAttrMaxBlocksPerMultiprocessor, device)};
  return devices.emplace(device, facts).first->second;  // a map's elements stay where they are
}

void allow_shared(const void* kernel, int bytes) {
  if (bytes <= kAlwaysAllowed) return;
  const int device = current_device_index();
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  most = bytes;
}

dim3 grid(const char* kernel, int64_t blocks, int64_t down) {
  if (blocks <= kMostBlocks && down <= kMostBlocksDown) return dim3(unsigned(blocks), unsigned(down));
  const auto size = [](int64_t x, int64_t y) { return std::to_string(x) + " x " + std::to_string(y); };
  throw std::runtime_error(std::string(kernel) + ": a grid must have at most " + size(kMostBlocks, kMostBlocksDown) +
                           " blocks, got " + size(blocks, down) + "; split the batch or the channels");
}

void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

}  // namespace rkl::cuda
