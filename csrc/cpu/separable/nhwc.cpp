// Separable convolution of NHWC images, a band at a time: its depthwise output stays in a core's cache, where the
// pointwise step reads it, and in backward, where it is made again, the pointwise step's gradients.
#include "cpu/separable/task_sums.h"

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

namespace {

class BandsBackward {
 public:
  BandsBackward(const Separable& s, const void* grad, const void* y, const Gradients& wanted)
      : s_(s),
        grad_(grad),
        y_(y),
        wanted_(wanted),
        bands_(s, band_pixels(s.g, s.dtype)),
        depthwise_(kernels(s.dtype).pack_filter(s.g, s.depthwise, s.depthwise_bias, s.dtype)),
        filter_{s.pointwise, nullptr, s.g.channels, s.c_out, true},
        pointwise_(wanted.depthwise_out ? packed(filter_, s.dtype) : Scratch()),
        streams_(wanted.depthwise_out &&
                 streams_rows(wanted.depthwise_out, s.g.batch * s.g.out_h * s.g.out_w, s.g.channels, s.inner, s.dtype)),
        sums_({std::min(shares(s), bands_.count()), 1}, s.g.channels, wanted.pointwise ? s.c_out : 0, s.dtype),
        bias_sums_(wanted.pointwise_bias ? sums_.tasks() * s.c_out : 0) {}

  void operator()() {
    torch::stable::parallel_for(0, sums_.tasks(), 1, [&](int64_t begin, int64_t end) {
      const Workspace work(*this);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = bands_.count() * task / sums_.tasks(), last = bands_.count() * (task + 1) / sums_.tasks();
        for (int64_t i = first; i < last; ++i) add_band(bands_[i], task, i == first, work);
      }
    });
    if (wanted_.pointwise) sums_.round_into(wanted_.pointwise);
    if (wanted_.pointwise_bias) round_bias(bias_sums_, s_.c_out, wanted_.pointwise_bias, s_.dtype);
  }

 private:
  static int64_t shares(const Separable& s) {
    return plan_shares(s.g.batch * s.g.out_h * s.g.out_w, s.g.channels, s.c_out).pixels;
  }
  bool activated() const { return s_.inner != Activation::none; }
  bool has_depthwise_out() const { return wanted_.pointwise || (wanted_.depthwise_out && activated()); }

  // A band's rows.
  struct Workspace {
    explicit Workspace(const BandsBackward& b)
        : dz(b.y_ ? b.rows(b.s_.c_out) : 0),
          depthwise_out(b.has_depthwise_out() ? b.rows(b.s_.g.channels) : 0),
          hidden(b.wanted_.pointwise && b.activated() ? b.rows(b.s_.g.channels) : 0),
          factors(b.sums_.scratch()) {}
    const Scratch dz, depthwise_out, hidden, factors;
  };
  int64_t rows(int64_t channels) const { return bands_.most_pixels() * channels * size_of(s_.dtype); }

  void add_band(const Band& band, int64_t task, bool first, const Workspace& work) {
    const int64_t n = band.pixels, c = s_.g.channels, c_out = s_.c_out;
    const Kernels& k = kernels(s_.dtype);
    const void* dz = at(grad_, band.first_pixel * c_out, s_.dtype);
    if (y_) {
      const void* y = at(y_, band.first_pixel * c_out, s_.dtype);
      k.activation_backward(dz, y, s_.outer, true, work.dz.as(), n * c_out, s_.dtype);
      dz = work.dz.as();
    }
    if (wanted_.pointwise_bias) k.add_column_sums(dz, bias_sums_.data() + task * c_out, n, c_out, s_.dtype);
    if (has_depthwise_out()) depthwise_band(s_, band, depthwise_, Activation::none, work.depthwise_out.as());
    if (wanted_.pointwise) {
      const void* hidden = work.depthwise_out.as();
      if (activated()) {
        k.finish({hidden, nullptr, work.hidden.as(), n, c, c, c}, s_.inner, s_.dtype, s_.dtype);
        hidden = work.hidden.as();
      }
      sums_.add(task, first, dz, hidden, n, work.factors);
    }
    if (!wanted_.depthwise_out) return;
    void* out = at(wanted_.depthwise_out, band.first_pixel * c, s_.dtype);
    k.pointwise_rows({dz, out, n, c_out, c, Activation::none, streams_}, 0, filter_.blocks(), pointwise_.as<float>(),
                     s_.dtype);
    if (activated()) k.activation_backward(out, work.depthwise_out.as(), s_.inner, false, out, n * c, s_.dtype);
  }

  const Separable& s_;
  const void *grad_, *y_;
  const Gradients wanted_;
  const Bands bands_;
  const PackedFilter depthwise_;
  const PointwiseFilter filter_;  // as the gradient's, from outputs to channels
  const Scratch pointwise_;
  const bool streams_;
  const FilterSums sums_;
  std::vector<double> bias_sums_;  // (task, C')
};

}  // namespace

void pointwise_backward_bands(const Separable& s, const void* grad, const void* y, const Gradients& wanted) {
  BandsBackward(s, grad, y, wanted)();
}

}  // namespace rkl::cpu
