// What stands around matrix products: over a band's, which are in cache, serial. Included once an instruction set, as
// simd/elementwise.h is.
#pragma once
#include "cpu/simd/elementwise.h"

namespace rkl::cpu::RKL_ISA {

// Calls f(i, count) for each vector of a row of n elements: whole vectors, then what is left.
template <class F>
inline void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, n - i);
}

template <class T>
inline Vec load_up_to(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_some(p, count);
}

template <class T>
inline void store_up_to(T* p, Vec v, int64_t count) {
  count == kLanes ? store(p, v) : store_some(p, v, count);
}

inline void widen(const void* in, float* out, int64_t n, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(in);
    for_vectors(n, [&](int64_t i, int64_t count) { store_up_to(out + i, load_up_to(from + i, count), count); });
  });
}

template <class Z, class T>
void finish_rows(const BandEpilogue& f, Activation act) {
  const Z* z = static_cast<const Z*>(f.z);
  const T* bias = static_cast<const T*>(f.bias);
  T* out = static_cast<T*>(f.out);
  for (int64_t r = 0; r < f.rows; ++r) {
    for_vectors(f.columns, [&](int64_t c, int64_t count) {
      const Vec b = bias ? load_up_to(bias + c, count) : Vec{};
      const Vec v = load_up_to(z + r * f.stride + c, count);
      store_up_to(out + r * f.stride + c, activate(act, v + b, T{}), count);
    });
  }
}

inline void finish(const BandEpilogue& f, Activation act, Dtype z_type, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    z_type == dtype ? finish_rows<T, T>(f, act) : finish_rows<float, T>(f, act);
  });
}

// out = act(z + bias) over dense rows of channels, shared between threads.
inline void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels,
                     Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!bias) return map<T>(z, z, out, rows * channels, [=](Vec v, Vec) { return activate(act, v, T{}); });
    torch::stable::parallel_for(0, rows, kGrain / channels + 1, [=](int64_t begin, int64_t end) {
      const T* from = static_cast<const T*>(z) + begin * channels;
      T* to = static_cast<T*>(out) + begin * channels;
      finish_rows<T, T>({from, bias, to, end - begin, channels, channels}, act);
    });
  });
}

// So many values are added up in fp32, and their sum in fp64.
constexpr int64_t kRun = 8;
using DoubleVec = double __attribute__((vector_size(kLanes * sizeof(double))));

// Adds the sum of each column to sums.
inline void add_column_sums(const void* matrix, double* sums, int64_t rows, int64_t columns, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    const auto* in = static_cast<const decltype(zero)*>(matrix);
    for_vectors(columns, [&](int64_t c, int64_t count) {
      DoubleVec sum{};
      for (int64_t first = 0; first < rows; first += kRun) {
        Vec run{};
        for (int64_t r = first; r < std::min(first + kRun, rows); ++r) run += load_up_to(in + r * columns + c, count);
        sum += __builtin_convertvector(run, DoubleVec);
      }
      for (int64_t i = 0; i < count; ++i) sums[c + i] += sum[i];
    });
  });
}

inline void round(const double* in, void* out, int64_t n, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < n; ++i) static_cast<T*>(out)[i] = T(float(in[i]));
  });
}

inline void sum_shares(const float* shares, int64_t count, int64_t stride, int64_t block, void* out, int64_t n,
                       Dtype dtype) {
  constexpr int64_t kBlock = PointwiseFilter::kOutputs;
  by_type(dtype, [&](auto zero) {
    for_vectors(n, [&](int64_t i, int64_t some) {
      const float* from = shares + i / kBlock * block + i % kBlock;
      DoubleVec sum{};
      for (int64_t share = 0; share < count; ++share)
        sum += __builtin_convertvector(load_up_to(from + share * stride, some), DoubleVec);
      store_up_to(static_cast<decltype(zero)*>(out) + i, __builtin_convertvector(sum, Vec), some);
    });
  });
}

}  // namespace rkl::cpu::RKL_ISA
