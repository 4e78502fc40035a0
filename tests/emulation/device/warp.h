// What the 32 threads of a warp do together: shuffles and votes, cp.async, ldmatrix and stmatrix, and the products of
// the tensor cores.
//
// All of it builds on one primitive: exchange() publishes a value, waits for every lane of the mask, and gives access
// to the values that the lanes published. Lane layouts are those of the PTX manual's figures for ldmatrix and mma.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

namespace emulator {

struct Lanes {
  const unsigned char (*values)[64];
  unsigned present;  // lanes that took part: a lane that returned early is missing

  template <class T>
  T get(int lane) const {
    T value;
    memcpy(&value, values[lane & 31], sizeof value);
    return value;
  }
  bool has(int lane) const { return present >> lane & 1; }
};

int lane();
Lanes exchange_bytes(unsigned mask, const void* value, size_t n);
// __syncwarp: an exchange of nothing, which also orders the lanes' accesses to memory. Others do not.
void sync_warp(unsigned mask, std::source_location at);

template <class T>
Lanes exchange(unsigned mask, const T& value) {
  static_assert(sizeof(T) <= 64);
  return exchange_bytes(mask, &value, sizeof value);
}

// cp.async: fills 16 bytes of shared memory with `valid` bytes of global memory, then zeros. Lands when waited for.
void copy_async_16(void* shared, const void* global, int valid);
void copy_commit();
void copy_wait(int groups_left);

// Loads and stores by 32-bit addresses of shared memory, as ptx.cuh makes them.
template <class T>
T load_shared(uint32_t address) {
  const void* p = shared_pointer(address);
  access(p, sizeof(T), false);
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}
template <class T>
void store_shared(uint32_t address, const T& value) {
  void* p = shared_pointer(address);
  access(p, sizeof(T), true);
  memcpy(p, &value, sizeof value);
}

// Four 8 x 8 matrices of 16-bit elements. The lanes' addresses name their rows, eight lanes for each matrix. A lane
// reads and writes what other lanes address, and the compiler reports these accesses as its own.
inline void load_matrix_x4(uint32_t (&fragment)[4], uint32_t row, bool transpose) {
  const void* p = shared_pointer(row);
  check_address(p, 16, false);
  const Lanes lanes = exchange(~0u, p);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const int along = lane() % 4 * 2 + e, across = lane() / 4;
      const int y = transpose ? along : across, x = transpose ? across : along;
      pair[e] = lanes.get<const uint16_t*>(matrix * 8 + y)[x];
    }
    memcpy(&fragment[matrix], pair, 4);
  }
}
inline void store_matrix_x4(uint32_t row, const uint32_t (&fragment)[4]) {
  void* p = shared_pointer(row);
  check_address(p, 16, true);
  const Lanes lanes = exchange(~0u, p);
  for (int matrix = 0; matrix < 4; ++matrix)
    memcpy(lanes.get<char*>(matrix * 8 + lane() / 4) + lane() % 4 * 4, &fragment[matrix], 4);
}

inline float element(uint32_t pair, int which, __nv_bfloat16) {
  const uint32_t bits = which ? pair & 0xffff0000u : pair << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float element(uint32_t pair, int which, __half) {
  const uint16_t bits = uint16_t(which ? pair >> 16 : pair);
  __half value;
  memcpy(&value, &bits, 2);
  return __half2float(value);
}

// d = a b + c, with a 16 x 16 and b 16 x 8 in 16 bits, c and d 16 x 8 in fp32. T: __nv_bfloat16 or __half.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Lanes lanes = exchange(~0u, mine);
  for (int i = 0; i < 4; ++i) {
    const int m = lane() / 4 + i / 2 * 8, n = lane() % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k)
      sum += element(lanes.get<Fragments>(m % 8 * 4 + k % 8 / 2).a[m / 8 + k / 8 * 2], k & 1, T{}) *
             element(lanes.get<Fragments>(n * 4 + k % 8 / 2).b[k / 8], k & 1, T{});
    d[i] = sum;
  }
}

// The hardware's tanh is off by up to 2^-11 of the value, but where it is off by how much is not documented. Here the
// bits of x choose a random part of that error, up or down. The result never passes 1; zeros, infinities and NaN are
// exact.
inline float tanh_approx(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = (bits ^ bits >> 15) * 0x9e3779b1u;
  const float off = (float(bits >> 8) / (1 << 23) - 1.f) * 0.999f / 2048;
  const float y = std::tanh(x) * (std::isinf(x) ? 1.f : 1.f + off);
  return std::min(std::max(y, -1.f), 1.f) == y || std::isnan(y) ? y : std::copysign(1.f, y);
}

}  // namespace emulator

// The shuffles keep the lane's own value where the source lies outside its group of `width` lanes.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int group = emulator::lane() & ~(width - 1);
  return emulator::exchange(mask, value).template get<T>(group | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
  const int self = emulator::lane(), source = self ^ with;
  const emulator::Lanes lanes = emulator::exchange(mask, value);
  return source / width > self / width ? value : lanes.template get<T>(source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int self = emulator::lane(), source = self + int(by);
  const emulator::Lanes lanes = emulator::exchange(mask, value);
  return source / width != self / width ? value : lanes.template get<T>(source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int self = emulator::lane(), source = self - int(by);
  const emulator::Lanes lanes = emulator::exchange(mask, value);
  return source < self / width * width ? value : lanes.template get<T>(source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emulator::Lanes lanes = emulator::exchange(mask, predicate != 0);
  unsigned votes = 0;
  for (int l = 0; l < 32; ++l)
    if (lanes.has(l) && lanes.get<bool>(l)) votes |= 1u << l;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline void __syncwarp(unsigned mask = ~0u, std::source_location at = std::source_location::current()) {
  emulator::sync_warp(mask, at);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
// The hardware's fast functions are right to a few units in the last place, so these may stand in for them.
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
using std::max;
using std::min;
