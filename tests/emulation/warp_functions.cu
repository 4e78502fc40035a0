// Each warp function on its own, with operands and results laid out as the CUDA and PTX manuals say.
#include "cuda/element.cuh"
#include "cuda/ptx.cuh"
#include "emulator.h"
#include "warp_functions.h"

namespace {

using rkl::cuda::bf16, rkl::cuda::f16;

constexpr int kAll = ~0;

// out: a row of 32 for each function.
__global__ void warp_functions(const int* in, int* out) {
  const int lane = threadIdx.x, v = in[lane];
  const int results[] = {
      __shfl_sync(kAll, v, 5),        __shfl_sync(kAll, v, lane + 1, 8), __shfl_xor_sync(kAll, v, 3),
      __shfl_xor_sync(kAll, v, 9, 8), __shfl_down_sync(kAll, v, 4),      __shfl_down_sync(kAll, v, 3, 16),
      __shfl_up_sync(kAll, v, 3),     __shfl_up_sync(kAll, v, 3, 8),     int(__ballot_sync(kAll, v > 0)),
      __any_sync(kAll, v > 0),        __all_sync(kAll, v > 0),           __any_sync(kAll, v > 22),
      __all_sync(kAll, v > -10)};
  for (int i = 0; i < int(sizeof results / sizeof *results); ++i) out[i * 32 + lane] = results[i];
}

template <class T>
__device__ uint32_t pair(T first, T second) {
  uint16_t bits[2];
  memcpy(&bits[0], &first, 2);
  memcpy(&bits[1], &second, 2);
  return uint32_t(bits[1]) << 16 | bits[0];
}

// d += a b, with d 16 x 8, a 16 x k and b k x 8, all stored by rows. The fragments are put together element by element.
// The sum is another array than the operand it is added to.
template <class T, int k>
__global__ void product(const T* a, const T* b, float* d) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
  const auto of_a = [&](int m, int j) { return pair(a[m * k + j], a[m * k + j + 1]); };
  const auto of_b = [&](int j, int n) { return pair(b[j * 8 + n], b[(j + 1) * 8 + n]); };
  const float c[4] = {d[row * 8 + column], d[row * 8 + column + 1], d[(row + 8) * 8 + column],
                      d[(row + 8) * 8 + column + 1]};
  float sum[4] = {NAN, NAN, NAN, NAN};
  if constexpr (k == 16)
    rkl::cuda::mma_m16n8k16<T>(
        sum, {of_a(row, column), of_a(row + 8, column), of_a(row, column + 8), of_a(row + 8, column + 8)},
        of_b(column, row), of_b(column + 8, row), c);
  else
    rkl::cuda::mma_m16n8k8<T>(sum, of_a(row, column), of_a(row + 8, column), of_b(column, row), c);
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + column + i % 2] = sum[i];
}

// The same product of 16 x 16 by 16 x 8, in place, with fragments loaded from shared memory by ldmatrix.
template <class T>
__global__ void product_ldmatrix(const T* a, const T* b, float* d) {
  __shared__ __align__(16) T shared_a[16 * 16];
  __shared__ __align__(16) T shared_b[16 * 16];  // in its left half
  const int lane = threadIdx.x, row = lane / 4, column = lane % 4 * 2;
  for (int i = lane; i < 16 * 16; i += 32) {
    shared_a[i] = a[i];
    shared_b[i] = b[i / 16 * 8 + i % 8];
  }
  __syncthreads();
  uint32_t of_a[4], of_b[4];
  rkl::cuda::ldmatrix_x4(of_a, rkl::cuda::shared_address(shared_a) + (lane % 16 * 16 + lane / 16 * 8) * 2);
  rkl::cuda::ldmatrix_x4<true>(of_b, shared_b + lane % 16 * 16 + lane / 16 * 8);
  float sum[4] = {d[row * 8 + column], d[row * 8 + column + 1], d[(row + 8) * 8 + column],
                  d[(row + 8) * 8 + column + 1]};
  rkl::cuda::mma_m16n8k16<T>(sum, of_a, {of_b[0], of_b[1]});
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + column + i % 2] = sum[i];
}

// out = in, four 8 x 8 matrices one below the other. The fragments are put together element by element. In shared
// memory the rows lie apart and in another order, and from there they are read 16 bytes at a time. by_hand: the way
// before sm_90.
template <bool by_hand>
__global__ void store_matrices(const uint16_t* in, uint16_t* out) {
  __shared__ __align__(16) uint16_t rows[32 * 24];
  const int lane = threadIdx.x, to = lane * 5 % 32;
  uint32_t fragment[4];
  for (int m = 0; m < 4; ++m) {
    const uint16_t* of_lane = in + (m * 8 + lane / 4) * 8 + lane % 4 * 2;
    fragment[m] = pair(of_lane[0], of_lane[1]);
  }
  const uint32_t row = rkl::cuda::shared_address(rows) + to * 48;
  if constexpr (by_hand)
    rkl::cuda::store_rows_of_matrices(row, fragment);
  else
    rkl::cuda::stmatrix_x4(row, fragment);
  __syncwarp();
  const uint4 v = rkl::cuda::load_shared_16(row);
  memcpy(out + lane * 8, &v, sizeof v);
}

constexpr int kTanhs = 32 * 256;

__global__ void tanhs(const float* x, float* y) {
  for (int i = threadIdx.x; i < kTanhs; i += 32) y[i] = rkl::cuda::tanh_approx(x[i]);
}

void run_warp_functions(const void* in, const void*, void* out) {
  warp_functions<<<1, 32>>>(static_cast<const int*>(in), static_cast<int*>(out));
}
template <class T, int k>
void run_product(const void* a, const void* b, void* d) {
  product<T, k><<<1, 32>>>(static_cast<const T*>(a), static_cast<const T*>(b), static_cast<float*>(d));
}
template <class T>
void run_product_ldmatrix(const void* a, const void* b, void* d) {
  product_ldmatrix<T><<<1, 32>>>(static_cast<const T*>(a), static_cast<const T*>(b), static_cast<float*>(d));
}
template <bool by_hand>
void run_store_matrices(const void* in, const void*, void* out) {
  store_matrices<by_hand><<<1, 32>>>(static_cast<const uint16_t*>(in), static_cast<uint16_t*>(out));
}
void run_tanhs(const void* x, const void*, void* y) {
  tanhs<<<1, 32>>>(static_cast<const float*>(x), static_cast<float*>(y));
}

}  // namespace

std::map<std::string, void (*)(const void*, const void*, void*)> warp_function_tests() {
  return {{"warp_functions", run_warp_functions},
          {"product_bf16_16", run_product<bf16, 16>},
          {"product_f16_16", run_product<f16, 16>},
          {"product_bf16_8", run_product<bf16, 8>},
          {"product_f16_8", run_product<f16, 8>},
          {"product_ldmatrix_bf16_16", run_product_ldmatrix<bf16>},
          {"product_ldmatrix_f16_16", run_product_ldmatrix<f16>},
          {"stmatrix", run_store_matrices<false>},
          {"stmatrix_by_hand", run_store_matrices<true>},
          {"tanhs", run_tanhs}};
}
