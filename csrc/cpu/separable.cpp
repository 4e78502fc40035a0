// Separable convolution, forward: a band of depthwise output that stays in cache is a factor of the library's matrix
// product, whose result is finished (bias, activation) before it leaves the cache.
#include "cpu/separable_band.h"

namespace rkl::cpu {

namespace {

// The pointwise step of a band: y = outer(pointwise * inner + bias).
class Pointwise {
 public:
  Pointwise(const Separable& s, void* y) : s_(s), y_(y), factor_(factor_type(s.dtype)), filter_(s, factor_) {}

  bool widens() const { return factor_ != s_.dtype; }

  // Floats that a band needs where its factors are widened.
  int64_t scratch(int64_t pixels) const { return widens() ? pixels * (s_.g.channels + s_.c_out) : 0; }

  // The output channels from `first` on, `count` of them.
  void operator()(const Band& band, const void* inner, int64_t first, int64_t count, float* scratch) const {
    const int64_t c = s_.g.channels, n = band.pixels;
    if (widens()) kernels(s_.dtype).widen(inner, scratch, n * c, s_.dtype);
    const void* in = widens() ? scratch : inner;
    const Matrix filter = filter_.rows(first, count);
    void* out = at(y_, band.first_pixel * s_.c_out + first, s_.dtype);
    const Matrix wanted{widens() ? scratch + n * c : out, factor_, n, count, widens() ? count : s_.c_out, 1};
    const Product product(matrix(in, factor_, n, c), transposed(filter), wanted);
    const Matrix& z = product.matrix();
    if (z.data == out && !s_.pointwise_bias && s_.outer == Activation::none) return;
    const void* bias = s_.pointwise_bias ? at(s_.pointwise_bias, first, s_.dtype) : nullptr;
    kernels(s_.dtype).finish({z.data, bias, out, n, count, z.row_stride, s_.c_out}, s_.outer, factor_, s_.dtype);
  }

 private:
  const Separable& s_;
  void* y_;
  const Dtype factor_;
  const PointwiseFilter filter_;
};

void by_bands(const Separable& s, const Pointwise& pointwise, const Bands& bands) {
  const int64_t pixels = bands.most_pixels();
  const PackedFilter filter = kernels(s.dtype).pack_filter(s.g, s.depthwise, s.depthwise_bias, s.dtype);
  for_tasks(bands.count(), [&](int64_t begin, int64_t end) {
    const Scratch inner(pixels * s.g.channels * size_of(s.dtype)), wide(pointwise.scratch(pixels) * sizeof(float));
    for (int64_t i = begin; i < end; ++i) {
      depthwise_band(s, bands[i], filter, s.inner, inner.as());
      pointwise(bands[i], inner.as(), 0, s.c_out, wide.as<float>());
    }
  });
}

void step_by_step(const Separable& s, const Pointwise& pointwise, const Bands& bands, int64_t columns) {
  const int64_t c = s.g.channels, tiles = (s.c_out + columns - 1) / columns;
  const Scratch inner(s.g.batch * s.g.out_h * s.g.out_w * c * size_of(s.dtype));
  kernels(s.dtype).depthwise(s.g, s.x, s.depthwise, s.depthwise_bias, s.inner, inner.as(), s.dtype);
  for_tasks(bands.count() * tiles, [&](int64_t begin, int64_t end) {
    const Scratch wide(pointwise.scratch(bands.most_pixels()) * sizeof(float));
    for (int64_t i = begin; i < end; ++i) {
      const Band band = bands[i / tiles];
      const int64_t first = i % tiles * columns, count = std::min(columns, s.c_out - first);
      pointwise(band, at(inner.as(), band.first_pixel * c, s.dtype), first, count, wide.as<float>());
    }
  });
}

}  // namespace

void separable(const Separable& s, void* y) {
  if (!s.g.nhwc) return separable_planes(s, y);
  const Pointwise pointwise(s, y);
  const ForwardPlan plan = forward_plan(s, factor_type(s.dtype));
  const Bands bands(s, plan.pixels);
  if (plan.fused)
    by_bands(s, pointwise, bands);
  else
    step_by_step(s, pointwise, bands, plan.columns);
}

}  // namespace rkl::cpu
