// Separable convolution of NHWC images, forward, a band at a time: its depthwise output stays in a core's cache, where
// the pointwise step reads it.
#include "cpu/separable/band.h"

namespace rkl::cpu {

void separable_bands(const Separable& s, void* y) {
  const Bands bands(s, band_pixels(s.g, s.dtype));
  const Kernels& k = kernels(s.dtype);
  const int64_t c = s.g.channels;
  const PackedFilter depthwise = k.pack_filter(s.g, s.depthwise, s.depthwise_bias, s.dtype);
  const bool streams = streams_rows(y, s.g.batch * s.g.out_h * s.g.out_w, s.c_out, s.outer, s.dtype);
  const PointwiseFilter filter{s.pointwise, s.pointwise_bias, s.c_out, c, false};
  const Scratch pointwise = packed(filter, s.dtype);
  torch::stable::parallel_for(0, bands.count(), 1, [&](int64_t begin, int64_t end) {
    const Scratch hidden(bands.most_pixels() * c * size_of(s.dtype));
    for (int64_t i = begin; i < end; ++i) {
      const Band band = bands[i];
      depthwise_band(s, band, depthwise, s.inner, hidden.as());
      void* out = at(y, band.first_pixel * s.c_out, s.dtype);
      k.pointwise_rows({hidden.as(), out, band.pixels, c, s.c_out, s.outer, streams}, 0, filter.blocks(),
                       pointwise.as<float>(), s.dtype);
    }
  });
}

}  // namespace rkl::cpu
