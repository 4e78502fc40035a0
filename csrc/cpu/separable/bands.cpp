// Separable convolution a band at a time. A band's depthwise output stays in a core's cache, where the pointwise step
// reads it. Backward makes it again, for the pointwise step's gradients.
#include "cpu/separable/task_sums.h"

namespace rkl::cpu {
namespace {

// Calls f(rows, first, pixels) for the pieces of a band's output: their rows, their first pixel and how many they have.
// NHWC images are made in one piece. NCHW images are made in pieces of some 256 pixels, which still lie in the cache
// when their planes are written (Ice Lake, two threads, over whole bands: 1.02 to 1.16 of the rate in fp32, 1.02
// to 1.13 in bf16; backward gained nothing). benchmarks/NOTES.md, "Planes written in pieces".
template <class F>
void for_pieces(const Band& band, bool nhwc, F&& f) {
  constexpr int64_t kPixels = 256;
  const ImageRows& all = band.out;
  const int64_t width = band.g.out_w, of_row = all.images * width;
  const int64_t most = nhwc || all.images > 1 ? all.rows : std::max<int64_t>(1, kPixels / width);
  for (int64_t row = 0; row < all.rows; row += most) {
    const int64_t rows = std::min(most, all.rows - row);
    f(ImageRows{all.image, all.images, all.row + row, rows}, row * of_row, rows * of_row);
  }
}

// Whether make_planes serves: for outputs that go past the caches (others gained nothing) and are no smaller than the
// depthwise output, which it packs.
bool streams_planes(const Separable& s, const void* y) {
  const Conv2d& g = s.g;
  return !g.nhwc && kernels(s.dtype).streams_planes && g.channels <= s.c_out &&
         streams_rows(y, g.batch * s.c_out * g.out_h, g.out_w, s.outer, s.dtype);
}

// Makes planes of outputs from the depthwise output of a band, a block of pixels at a time: the filter's rows times the
// pixels, which are packed as a filter's outputs are. So nothing is transposed but the depthwise output, and planes are
// written in whole lines. `packed` holds one block.
void make_planes(const Separable& s, const Band& band, const void* hidden, float* packed, void* y) {
  const Kernels& k = kernels(s.dtype);
  const ImageRows& rows = band.out;
  const int64_t c = s.g.channels, plane = s.g.out_h * s.g.out_w, pixels = rows.rows * s.g.out_w;
  for (int64_t image = 0; image < rows.images; ++image)
    for (int64_t first = 0; first < pixels; first += PointwiseFilter::kOutputs) {
      const int64_t count = std::min(PointwiseFilter::kOutputs, pixels - first);
      void* out = at(y, (rows.image + image) * s.c_out * plane + rows.row * s.g.out_w + first, s.dtype);
      k.pack_pointwise({at(hidden, (image * pixels + first) * c, s.dtype), nullptr, count, c, false}, 0, 1, packed);
      k.pointwise_rows({s.pointwise, out, s.c_out, c, count, plane, s.outer, true, s.pointwise_bias}, 0, 1, packed);
    }
}

}  // namespace

void separable_bands(const Separable& s, void* y) {
  const Bands bands(s.g, band_pixels(s.g, s.c_out, s.dtype));
  const Kernels& k = kernels(s.dtype);
  const int64_t c = s.g.channels, size = size_of(s.dtype);
  const PackedFilter depthwise = k.pack_filter(bands.depthwise(), s.depthwise, s.depthwise_bias);
  const bool streams = s.g.nhwc && streams_rows(y, s.g.batch * s.g.out_h * s.g.out_w, s.c_out, s.outer, s.dtype);
  const PointwiseFilter filter{s.pointwise, s.pointwise_bias, s.c_out, c, false};
  const bool planes = streams_planes(s, y);
  const Scratch pointwise = planes ? Scratch() : packed(filter, s.dtype);
  const BandImages in(s.x, c, s.g.in_h, s.g.in_w, s), out(y, s.c_out, s.g.out_h, s.g.out_w, s);
  const int64_t block = planes ? PointwiseFilter::kOutputs * (c + 1) : bands.most_pixels() * s.c_out;
  const int64_t own_size = s.g.nhwc ? 0 : std::max(bands.most_read() * c, block) * size;
  torch::stable::parallel_for(0, bands.count(), 1, [&](int64_t begin, int64_t end) {
    const Scratch hidden(bands.most_pixels() * c * size), own(own_size);
    for (int64_t i = begin; i < end; ++i) {
      const Band band = bands[i];
      k.depthwise_packed(band.g, in.read(band.in, own.as()), depthwise, s.inner, in.bytes(), hidden.as());
      if (planes) {
        make_planes(s, band, hidden.as(), own.as<float>(), y);
        continue;
      }
      for_pieces(band, s.g.nhwc, [&](const ImageRows& rows, int64_t first, int64_t pixels) {
        const void* from = at(hidden.as(), first * c, s.dtype);
        void* to = out.made_at(rows, own.as());
        k.pointwise_rows({from, to, pixels, c, s.c_out, s.c_out, s.outer, streams, nullptr}, 0, filter.blocks(),
                         pointwise.as<float>());
        out.written(rows, own.as());
      });
    }
  });
}

void pointwise_backward_bands(const Separable& s, const void* grad, const void* y, const Gradients& wanted) {
  const Conv2d& g = s.g;
  const Kernels& k = kernels(s.dtype);
  const int64_t c = g.channels, c_out = s.c_out, size = size_of(s.dtype), all = g.batch * g.out_h * g.out_w;
  const bool activates = s.inner != Activation::none;
  const bool makes_depthwise = wanted.pointwise || (wanted.depthwise_out && activates);
  const Bands bands(g, band_pixels(g, c_out, s.dtype));
  const BandImages grads(grad, c_out, g.out_h, g.out_w, s), outputs(y, c_out, g.out_h, g.out_w, s),
      in(s.x, c, g.in_h, g.in_w, s), depthwise_out(wanted.depthwise_out, c, g.out_h, g.out_w, s);
  const PackedFilter depthwise = k.pack_filter(bands.depthwise(), s.depthwise, s.depthwise_bias);
  const PointwiseFilter filter{s.pointwise, nullptr, c, c_out, true};  // from outputs to channels
  const Scratch pointwise = wanted.depthwise_out ? packed(filter, s.dtype) : Scratch();
  const bool streams = g.nhwc && wanted.depthwise_out && streams_rows(wanted.depthwise_out, all, c, s.inner, s.dtype);
  const int64_t tasks = std::min(plan_shares(all, c, c_out).pixels, bands.count());
  const FilterSums sums({tasks, 1}, c, wanted.pointwise ? c_out : 0, s.dtype);
  std::vector<double> bias_sums(wanted.pointwise_bias ? tasks * c_out : 0);  // (task, C')
  const auto rows = [&](bool needed, int64_t channels) { return needed ? bands.most_pixels() * channels * size : 0; };
  const int64_t own_size = std::max(rows(!g.nhwc, std::max(c, c_out)), g.nhwc ? 0 : bands.most_read() * c * size);

  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    // Memory for a band's rows. own holds those of outputs, in and depthwise_out, one after the other.
    const Scratch dz_rows(rows(y || !g.nhwc, c_out)), depthwise_rows(rows(makes_depthwise, c)),
        hidden_rows(rows(wanted.pointwise && activates, c)), own_rows(own_size), factors = sums.scratch();
    void* const own = own_rows.as();
    const auto add = [&](const Band& band, int64_t task, bool first) {
      const int64_t n = band.pixels;
      const void* dz = grads.read(band.out, dz_rows.as());
      if (y) {
        k.activation_backward(dz, outputs.read(band.out, own), s.outer, true, dz_rows.as(), n * c_out);
        dz = dz_rows.as();
      }
      if (wanted.pointwise_bias) k.add_column_sums(dz, bias_sums.data() + task * c_out, n, c_out);
      if (makes_depthwise)
        k.depthwise_packed(band.g, in.read(band.in, own), depthwise, Activation::none, in.bytes(), depthwise_rows.as());
      if (wanted.pointwise) {
        if (activates) k.epilogue(depthwise_rows.as(), nullptr, s.inner, hidden_rows.as(), n, c);
        sums.add(task, first, dz, activates ? hidden_rows.as() : depthwise_rows.as(), n, factors);
      }
      if (!wanted.depthwise_out) return;
      void* out = depthwise_out.made_at(band.out, own);
      k.pointwise_rows({dz, out, n, c_out, c, c, Activation::none, streams, nullptr}, 0, filter.blocks(),
                       pointwise.as<float>());
      if (activates) k.activation_backward(out, depthwise_rows.as(), s.inner, false, out, n * c);
      depthwise_out.written(band.out, own);
    };
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = bands.count() * task / tasks, last = bands.count() * (task + 1) / tasks;
      for (int64_t i = first; i < last; ++i) add(bands[i], task, i == first);
    }
  });
  if (wanted.pointwise) sums.round_into(wanted.pointwise);
  if (wanted.pointwise_bias) round_bias(bias_sums, c_out, wanted.pointwise_bias, s.dtype);
}

}  // namespace rkl::cpu
