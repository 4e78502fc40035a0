// Separable convolution, forward: a band of depthwise output that stays in cache is a factor of the library's matrix
// product, whose result is finished (bias, activation) before it leaves the cache.
#include "cpu/separable/band.h"

namespace rkl::cpu {

namespace {

// The pointwise step of a band: y = outer(pointwise * inner + bias).
void pointwise_band(const Separable& s, const Band& band, const void* inner, void* y) {
  const int64_t n = band.pixels, c = s.g.channels, c_out = s.c_out;
  void* out = at(y, band.first_pixel * c_out, s.dtype);
  const Matrix filter = matrix(s.pointwise, s.dtype, c_out, c);
  const Product product(matrix(inner, s.dtype, n, c), transposed(filter), matrix(out, s.dtype, n, c_out));
  const Matrix& z = product.matrix();
  if (z.data == out && !s.pointwise_bias && s.outer == Activation::none) return;
  kernels(s.dtype).finish({z.data, s.pointwise_bias, out, n, c_out, z.row_stride, c_out}, s.outer, s.dtype, s.dtype);
}

}  // namespace

// Reading the depthwise output again costs less than its products do but where there are few of them: 24 outputs of 144
// channels, 56 px: 3.0 ms against 3.6 unfused; 80 of 240 channels, 14 px: 1.0 against 0.94.
bool fuses(const Separable& s) {
  constexpr int64_t kFewOutputs = 32;
  if (!s.g.nhwc) return planes_serve(s.g, s.dtype);
  const int64_t bytes = s.g.batch * s.g.out_h * s.g.out_w * s.g.channels * size_of(s.dtype);
  return factor_type(s.dtype) == s.dtype && s.c_out <= kFewOutputs && bytes >= kBandBytes;
}

void separable(const Separable& s, void* y) {
  if (!s.g.nhwc) return separable_planes(s, y);
  const Bands bands(s, band_pixels(s));
  const PackedFilter filter = kernels(s.dtype).pack_filter(s.g, s.depthwise, s.depthwise_bias, s.dtype);
  for_tasks(bands.count(), [&](int64_t begin, int64_t end) {
    const Scratch inner(bands.most_pixels() * s.g.channels * size_of(s.dtype));
    for (int64_t i = begin; i < end; ++i) {
      depthwise_band(s, bands[i], filter, s.inner, inner.as());
      pointwise_band(s, bands[i], inner.as(), y);
    }
  });
}

}  // namespace rkl::cpu
