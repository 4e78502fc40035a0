// All inline PTX: shared memory by 32-bit addresses, asynchronous copies into it, the tensor cores, and tanh. On the
// CPU the tests' emulator stands in.
//
// A shared address is 32 bits wide. Kernels whose time is instructions keep such addresses instead of pointers: a
// pointer takes two registers, and two instructions for every addition.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace rkl::cuda {

#ifdef RKL_EMULATOR

inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }
inline uint4 load_shared_16(uint32_t shared) { return emulator::load_shared<uint4>(shared); }
inline void store_shared_4(uint32_t shared, uint32_t value) { emulator::store_shared(shared, value); }
inline void cp_async_16(uint32_t shared, const void* global, int valid) {
  emulator::copy_async_16(emulator::shared_pointer(shared), global, valid);
}
inline void cp_async_16_or_zeros(uint32_t shared, const void* global, bool copies) {
  emulator::copy_async_16(emulator::shared_pointer(shared), global, copies ? 16 : 0);
}
inline void cp_async_commit() { emulator::copy_commit(); }
inline uint32_t opaque(uint32_t x) { return x; }
template <int groups_left>
void cp_async_wait() {
  emulator::copy_wait(groups_left);
}
template <bool transpose = false>
void ldmatrix_x4(uint32_t (&fragment)[4], uint32_t row) {
  emulator::load_matrix_x4(fragment, row, transpose);
}
inline void stmatrix_x4(uint32_t row, const uint32_t (&fragment)[4]) { emulator::store_matrix_x4(row, fragment); }
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  emulator::mma_m16n8k16<T>(d, a, b0, b1, c);
}
template <class T>
void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, const float (&c)[4]) {
  emulator::mma_m16n8k16<T>(d, {a0, a1, 0, 0}, b, 0, c);
}
inline float tanh_approx(float x) { return emulator::tanh_approx(x); }

#else

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Returns x, and keeps the compiler from computing it again at every use.
__device__ inline uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Loads 16 bytes from a multiple of 16.
__device__ inline uint4 load_shared_16(uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}
__device__ inline void store_shared_4(uint32_t shared, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

// Copies `valid` bytes of 16 to shared memory and fills the rest with zeros: valid = 0 is an image's padding. Both
// addresses must be multiples of 16, the global one a pointer into an allocation even where valid is 0.
__device__ inline void cp_async_16(uint32_t shared, const void* global, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid) : "memory");
}
// Copies 16 bytes, or writes as many zeros. A predicate costs nothing, where a number of bytes costs four instructions.
__device__ inline void cp_async_16_or_zeros(uint32_t shared, const void* global, bool copies) {
  asm volatile(
      "{ .reg .pred ignored; setp.eq.u32 ignored, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, ignored; }" ::"r"(shared),
      "l"(global), "r"(uint32_t(copies))
      : "memory");
}
// Closes a group of copies; a group may be empty.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the newest groups_left groups are in flight. Other threads' copies also need a __syncthreads.
template <int groups_left>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements. Lane 8 m + r gives the address of row r of matrix m. fragment[m] holds
// row lane / 4, columns lane % 4 * 2 and the next, of matrix m or of its transpose.
template <bool transpose = false>
__device__ inline void ldmatrix_x4(uint32_t (&fragment)[4], uint32_t row) {
  if constexpr (transpose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(row)
                 : "memory");
}

__device__ inline void store_rows_of_matrices(uint32_t row, const uint32_t (&fragment)[4]);

// Stores such fragments: lane 8 m + r gives the address of row r of matrix m. Other lanes read it after a __syncwarp.
__device__ inline void stmatrix_x4(uint32_t row, const uint32_t (&fragment)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(fragment[0]),
               "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
#else
  store_rows_of_matrices(row, fragment);
#endif
}

// d = a b + c on a tensor core: a 16 x 16 and b 16 x 8 of T (bf16 or fp16), c and d 16 x 8 in fp32; d may be c. Element
// i of c and d is row lane / 4 + i / 2 * 8, column lane % 4 * 2 + i % 2. a holds the fragments of its quarters, top
// left, bottom left, top right, bottom right; b those of its halves' transposes.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    const float (&c)[4]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// The same with a 16 x 8 (top, bottom) and b 8 x 8.
template <class T>
__device__ inline void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, const float (&c)[4]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// tanh to a relative error of 2^-11, in one instruction: for results that are rounded to 16 bits.
__device__ inline float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

// stmatrix_x4 for GPUs older than sm_90, which lack the instruction. Each lane stores its pair of every matrix; it
// takes the row's address from the lane that has it. The four lanes of a row fill 16 bytes, so rows that suit stmatrix
// have no bank conflicts here.
__device__ inline void store_rows_of_matrices(uint32_t row, const uint32_t (&fragment)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < 4; ++m) store_shared_4(__shfl_sync(~0u, row, m * 8 + lane / 4) + lane % 4 * 4, fragment[m]);
}

// The same with pointers.
__device__ inline void cp_async_16(void* shared, const void* global, int valid) {
  cp_async_16(shared_address(shared), global, valid);
}
template <bool transpose = false>
__device__ inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
  ldmatrix_x4<transpose>(fragment, shared_address(row));
}

// In place: d += a b.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_m16n8k16<T>(d, a, b[0], b[1], d);
}
template <class T>
__device__ inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
  mma_m16n8k8<T>(d, a[0], a[1], b, d);
}

}  // namespace rkl::cuda
