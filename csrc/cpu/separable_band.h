// What forward and backward do with a band.
#pragma once
#include "cpu/kernels.h"
#include "cpu/matrix.h"
#include "cpu/scratch.h"
#include "cpu/separable_plan.h"

namespace rkl::cpu {

// The depthwise step of a band, into memory of the band's own.
inline void depthwise_band(const Separable& s, const Band& band, const PackedFilter& filter, Activation act,
                           void* out) {
  const int64_t first = (band.image * s.g.in_h + band.first_in_row) * s.g.in_w * s.g.channels;
  kernels(s.dtype).depthwise_packed(band.g, at(s.x, first, s.dtype), filter, act, out, s.dtype);
}

// The pointwise filter in the type that the library multiplies.
class PointwiseFilter {
 public:
  PointwiseFilter(const Separable& s, Dtype factor)
      : all_(rkl::cpu::matrix(s.pointwise, factor, s.c_out, s.g.channels)) {
    if (factor == s.dtype) return;
    wide_ = Scratch(all_.rows * all_.columns * sizeof(float));
    kernels(s.dtype).widen(s.pointwise, wide_.as<float>(), all_.rows * all_.columns, s.dtype);
    all_.data = wide_.as();
  }

  Matrix matrix() const { return all_; }

  Matrix rows(int64_t first, int64_t count) const {
    Matrix some = all_;
    some.data = at(all_.data, first * all_.columns, all_.dtype);
    some.rows = count;
    return some;
  }

 private:
  Matrix all_;
  Scratch wide_;
};

}  // namespace rkl::cpu
