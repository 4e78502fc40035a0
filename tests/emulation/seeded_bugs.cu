// Kernels with one mistake each, which the emulator must catch. They are mutations of `correct`.
#include "cuda/ptx.cuh"
#include "emulator.h"
#include "seeded_bugs.h"

namespace {

constexpr int kThreads = 128;

enum class Bug {
  none,
  missing_barrier,
  shared_overrun,
  global_overrun,
  divergent_barrier,
  early_return,
  wait_count,
  missing_wait,
  block_race,
  lost_lane,
};

// out[i] = in[i - 1] + in[i + 1] around a ring of kThreads, through shared memory. Each block has its own ring.
template <Bug bug>
__global__ void ring(const float* in, float* out) {
  __shared__ __align__(16) float first[kThreads];
  __shared__ __align__(16) float second[kThreads];
  const int i = threadIdx.x;
  in += blockIdx.x * kThreads;
  out += blockIdx.x * kThreads;
  // Two groups of copies. The first is needed first.
  if (i < kThreads / 4) rkl::cuda::cp_async_16(first + i * 4, in + i * 4, 16);
  rkl::cuda::cp_async_commit();
  if (i < kThreads / 4) rkl::cuda::cp_async_16(second + i * 4, in + i * 4, 16);
  rkl::cuda::cp_async_commit();
  if (bug == Bug::divergent_barrier && i < 32) {
    __syncthreads();
    out[i] = 0;
  }
  rkl::cuda::cp_async_wait<(bug == Bug::wait_count ? 2 : 1)>();
  if (bug == Bug::early_return && i == 5) return;
  if (bug != Bug::missing_barrier) __syncthreads();
  const float left = first[(i + kThreads - 1) % kThreads];
  if (bug != Bug::missing_wait) rkl::cuda::cp_async_wait<0>();
  __syncthreads();
  const float right = second[bug == Bug::shared_overrun ? i + 1 : (i + 1) % kThreads];
  if (bug == Bug::lost_lane && i % 32 != 3) __syncwarp();
  if (bug == Bug::lost_lane && i % 32 == 3) __syncthreads();
  if (bug == Bug::global_overrun && blockIdx.x == 1 && i == kThreads - 1) out[i + 1] = 0;
  if (bug == Bug::block_race && i == 0) out[blockIdx.x ? -1 : kThreads] = 0;
  out[i] = left + right;
}

template <Bug bug>
void launch_ring(const float* in, float* out) {
  ring<bug><<<2, kThreads>>>(in, out);
}

struct alignas(16) Four {
  float v[4];
};

__global__ void shifted_vectors(const float* in, float* out) {
  reinterpret_cast<Four*>(out)[threadIdx.x] = *reinterpret_cast<const Four*>(in + threadIdx.x * 4 + 1);
}
void misaligned_vector(const float* in, float* out) { shifted_vectors<<<1, 32>>>(in, out); }

__global__ void half_in_flight(const float* in, float*) {
  __shared__ __align__(16) float copy[128];
  rkl::cuda::cp_async_16(copy + threadIdx.x * 4, in + threadIdx.x * 4, 16);
  rkl::cuda::cp_async_commit();
}
void copy_in_flight(const float* in, float* out) { half_in_flight<<<1, 32>>>(in, out); }

__global__ void too_much_shared(const float*, float* out) {
  extern __shared__ float buffer[];
  buffer[threadIdx.x] = 1.f;
  out[threadIdx.x] = buffer[threadIdx.x];
}
void shared_limit(const float* in, float* out) { too_much_shared<<<1, 32, 64 * 1024>>>(in, out); }

// The launch asks for 44 KiB, which alone need no opt-in, and the kernel has 8 KiB of static shared memory.
__global__ void too_much_with_static(const float*, float* out) {
  extern __shared__ float buffer[];
  __shared__ float own[2048];
  own[threadIdx.x] = buffer[threadIdx.x] = 1.f;
  out[threadIdx.x] = buffer[threadIdx.x] + own[threadIdx.x];
}
void static_shared_limit(const float* in, float* out) { too_much_with_static<<<1, 32, 44 * 1024>>>(in, out); }

enum class RowBug { none, missing_barrier, overrun, misaligned, foreign_address };

// Each warp stores 32 rows of 16 bytes by stmatrix at 32-bit addresses. Each thread then copies a row that another warp
// stored to `out`.
template <RowBug bug>
__global__ void rows_through_shared(const float* in, float* out) {
  __shared__ __align__(16) float rows[64 * 4];
  const uint32_t row = rkl::cuda::shared_address(rows) + threadIdx.x * 16;
  uint32_t fragment[4];
  memcpy(fragment, in + threadIdx.x * 4, sizeof fragment);
  rkl::cuda::stmatrix_x4(bug == RowBug::misaligned ? row + 4 : row, fragment);
  if (bug != RowBug::missing_barrier) __syncthreads();
  const uint32_t other = row ^ (32 * 16), past = bug == RowBug::overrun ? 32 * 16 : 0;
  const uint4 v = rkl::cuda::load_shared_16(bug == RowBug::foreign_address ? other + (1u << 31) : other + past);
  memcpy(out + threadIdx.x * 4, &v, sizeof v);
}
template <RowBug bug>
void launch_rows(const float* in, float* out) {
  rows_through_shared<bug><<<1, 64>>>(in, out);
}

enum class LaneBug {
  none,
  copy,
  copy_over,
  overwrite,
  broadcast,
  store,
  shuffle,
  stmatrix,
  ldmatrix,
  partial,
  warp_for_block
};

// A __syncwarp that a kernel with this bug lacks.
template <LaneBug bug, LaneBug missing>
__device__ void sync_unless() {
  if (bug != missing) __syncwarp();
}

// out = in, where neighbouring lanes have swapped their rows of four numbers, by several ways through shared memory.
// Only the last of them leads to another warp.
template <LaneBug bug>
__global__ void rows_between_lanes(const float* in, float* out) {
  __shared__ uint4 rows[64];
  const int thread = threadIdx.x, lane = thread % 32;
  const uint32_t row = rkl::cuda::shared_address(rows + thread), neighbour = row ^ 16;
  rkl::cuda::cp_async_16(row, in + thread * 4, 16);
  rkl::cuda::cp_async_commit();
  rkl::cuda::cp_async_wait<0>();
  sync_unless<bug, LaneBug::copy>();
  rkl::cuda::load_shared_16(neighbour);
  sync_unless<bug, LaneBug::copy_over>();
  rkl::cuda::cp_async_16(row, in + (thread ^ 1) * 4, 16);
  rkl::cuda::cp_async_commit();
  __syncwarp();
  rkl::cuda::cp_async_wait<0>();
  __syncwarp();
  const uint4 theirs = rkl::cuda::load_shared_16(neighbour);
  sync_unless<bug, LaneBug::overwrite>();
  rows[thread] = theirs;
  if (bug == LaneBug::shuffle)
    __shfl_sync(~0u, 0, 0);
  else
    sync_unless<bug, LaneBug::store>();
  const uint4 mine = rkl::cuda::load_shared_16(neighbour);
  __syncwarp();
  // The pair of lane 4 r + c goes to word c of row r of each matrix, which lanes read as rows, and back.
  const uint32_t words[4] = {mine.x, mine.y, mine.z, mine.w};
  rkl::cuda::stmatrix_x4(row, words);
  sync_unless<bug, LaneBug::stmatrix>();
  rows[thread] = rkl::cuda::load_shared_16(row);
  if (bug == LaneBug::partial)
    __syncwarp(lane < 16 ? 0xffffu : 0xffff0000u);
  else
    sync_unless<bug, LaneBug::ldmatrix>();
  uint32_t fragment[4];
  rkl::cuda::ldmatrix_x4(fragment, row);
  // All lanes read what one of them then writes: of the warp, and of the block.
  const unsigned* bits = reinterpret_cast<const unsigned*>(in);
  const unsigned zero = rows[thread / 32 * 32].x - bits[thread / 32 * 128 + 4];
  sync_unless<bug, LaneBug::broadcast>();
  if (lane == 5) ++rows[thread / 32 * 32].x;
  __syncthreads();
  const unsigned one = rows[0].x - bits[4];
  bug == LaneBug::warp_for_block ? __syncwarp() : __syncthreads();
  if (thread == 5) ++rows[0].x;
  reinterpret_cast<uint4*>(out)[thread] = {fragment[0] + zero, fragment[1], fragment[2], fragment[3] * one};
}
template <LaneBug bug>
void launch_lanes(const float* in, float* out) {
  rows_between_lanes<bug><<<1, 64>>>(in, out);
}

}  // namespace

std::map<std::string, void (*)(const float*, float*)> seeded_bugs() {
  return {
      {"correct", launch_ring<Bug::none>},
      {"missing_barrier", launch_ring<Bug::missing_barrier>},
      {"shared_overrun", launch_ring<Bug::shared_overrun>},
      {"global_overrun", launch_ring<Bug::global_overrun>},
      {"divergent_barrier", launch_ring<Bug::divergent_barrier>},
      {"early_return", launch_ring<Bug::early_return>},
      {"wait_count", launch_ring<Bug::wait_count>},
      {"missing_wait", launch_ring<Bug::missing_wait>},
      {"block_race", launch_ring<Bug::block_race>},
      {"lost_lane", launch_ring<Bug::lost_lane>},
      {"misaligned_vector", misaligned_vector},
      {"copy_in_flight", copy_in_flight},
      {"shared_limit", shared_limit},
      {"static_shared_limit", static_shared_limit},
      {"correct_rows", launch_rows<RowBug::none>},
      {"row_barrier", launch_rows<RowBug::missing_barrier>},
      {"row_overrun", launch_rows<RowBug::overrun>},
      {"misaligned_row", launch_rows<RowBug::misaligned>},
      {"foreign_address", launch_rows<RowBug::foreign_address>},
      {"correct_lanes", launch_lanes<LaneBug::none>},
      {"lane_copy", launch_lanes<LaneBug::copy>},
      {"lane_copy_over", launch_lanes<LaneBug::copy_over>},
      {"lane_overwrite", launch_lanes<LaneBug::overwrite>},
      {"lane_broadcast", launch_lanes<LaneBug::broadcast>},
      {"lane_store", launch_lanes<LaneBug::store>},
      {"lane_shuffle", launch_lanes<LaneBug::shuffle>},
      {"lane_stmatrix", launch_lanes<LaneBug::stmatrix>},
      {"lane_ldmatrix", launch_lanes<LaneBug::ldmatrix>},
      {"half_warps", launch_lanes<LaneBug::partial>},
      {"warp_for_block", launch_lanes<LaneBug::warp_for_block>},
  };
}
