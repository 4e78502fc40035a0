// What forward and backward do with a band.
#pragma once
#include "cpu/kernels.h"
#include "cpu/separable/matrix.h"
#include "cpu/separable/plan.h"
#include "cpu/simd/scratch.h"

namespace rkl::cpu {

// A pointwise filter in the order that pointwise_rows reads it in.
Scratch packed(const PointwiseFilter& filter, Dtype dtype);

// Whether outputs of so many rows go past the caches: not where an activation reads them again.
inline bool streams_rows(const void* out, int64_t rows, int64_t outputs, Activation act, Dtype dtype) {
  const int64_t row = outputs * size_of(dtype);
  return act == Activation::none && exceeds_caches(rows * row) && in_whole_lines(out, row) &&
         is_resident(at(out, rows / 2 * outputs, dtype));
}

// The depthwise step of a band, into memory of the band's own.
inline void depthwise_band(const Separable& s, const Band& band, const PackedFilter& filter, Activation act,
                           void* out) {
  const int64_t first = (band.image * s.g.in_h + band.first_in_row) * s.g.in_w * s.g.channels;
  kernels(s.dtype).depthwise_packed(band.g, at(s.x, first, s.dtype), filter, act, out, s.dtype);
}

}  // namespace rkl::cpu
