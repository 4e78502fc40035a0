// Separable convolution, forward: a band of depthwise output that stays in cache is a factor of the library's matrix
// product, whose result is finished (bias, activation) before it leaves the cache.
#include "cpu/separable/band.h"

namespace rkl::cpu {

namespace {

// The pointwise step of a band: y = outer(pointwise * hidden + bias).
void pointwise_band(const Separable& s, const Band& band, const void* hidden, void* y) {
  const int64_t n = band.pixels, c = s.g.channels, c_out = s.c_out;
  void* out = at(y, band.first_pixel * c_out, s.dtype);
  const Matrix filter = matrix(s.pointwise, s.dtype, c_out, c);
  const Product product(matrix(hidden, s.dtype, n, c), transposed(filter), matrix(out, s.dtype, n, c_out));
  const Matrix& z = product.matrix();
  if (z.data == out && !s.pointwise_bias && s.outer == Activation::none) return;
  kernels(s.dtype).finish({z.data, s.pointwise_bias, out, n, c_out, z.row_stride, c_out}, s.outer, s.dtype, s.dtype);
}

}  // namespace

void separable_bands(const Separable& s, void* y) {
  const Bands bands(s, band_pixels(s));
  const PackedFilter filter = kernels(s.dtype).pack_filter(s.g, s.depthwise, s.depthwise_bias, s.dtype);
  for_tasks(bands.count(), [&](int64_t begin, int64_t end) {
    const Scratch hidden(bands.most_pixels() * s.g.channels * size_of(s.dtype));
    for (int64_t i = begin; i < end; ++i) {
      depthwise_band(s, bands[i], filter, s.inner, hidden.as());
      pointwise_band(s, bands[i], hidden.as(), y);
    }
  });
}

}  // namespace rkl::cpu
