// Separable convolution a band at a time: its depthwise output stays in a core's cache, where the pointwise step reads
// it, and in backward, where it is made again, the pointwise step's gradients.
#include "cpu/separable/task_sums.h"

namespace rkl::cpu {

void separable_bands(const Separable& s, void* y) {
  const Bands bands(s.g, band_pixels(s.g, s.c_out, s.dtype));
  const Kernels& k = kernels(s.dtype);
  const int64_t c = s.g.channels, size = size_of(s.dtype);
  const PackedFilter depthwise = k.pack_filter(bands.depthwise(), s.depthwise, s.depthwise_bias);
  const bool streams = s.g.nhwc && streams_rows(y, s.g.batch * s.g.out_h * s.g.out_w, s.c_out, s.outer, s.dtype);
  const PointwiseFilter filter{s.pointwise, s.pointwise_bias, s.c_out, c, false};
  const Scratch pointwise = packed(filter, s.dtype);
  const BandImages in(s.x, c, s.g.in_h, s.g.in_w, s), out(y, s.c_out, s.g.out_h, s.g.out_w, s);
  const int64_t own_size = s.g.nhwc ? 0 : std::max(bands.most_read() * c, bands.most_pixels() * s.c_out) * size;
  torch::stable::parallel_for(0, bands.count(), 1, [&](int64_t begin, int64_t end) {
    const Scratch hidden(bands.most_pixels() * c * size), own(own_size);
    for (int64_t i = begin; i < end; ++i) {
      const Band band = bands[i];
      k.depthwise_packed(band.g, in.read(band.in, own.as()), depthwise, s.inner, in.bytes(), hidden.as());
      k.pointwise_rows({hidden.as(), out.made_at(band.out, own.as()), band.pixels, c, s.c_out, s.outer, streams}, 0,
                       filter.blocks(), pointwise.as<float>());
      out.written(band.out, own.as());
    }
  });
}

namespace {

class BandsBackward {
 public:
  BandsBackward(const Separable& s, const void* grad, const void* y, const Gradients& wanted)
      : s_(s),
        activated_(y),
        wanted_(wanted),
        bands_(s.g, band_pixels(s.g, s.c_out, s.dtype)),
        grad_(grad, s.c_out, s.g.out_h, s.g.out_w, s),
        y_(y, s.c_out, s.g.out_h, s.g.out_w, s),
        x_(s.x, s.g.channels, s.g.in_h, s.g.in_w, s),
        depthwise_out_(wanted.depthwise_out, s.g.channels, s.g.out_h, s.g.out_w, s),
        depthwise_(kernels(s.dtype).pack_filter(bands_.depthwise(), s.depthwise, s.depthwise_bias)),
        filter_{s.pointwise, nullptr, s.g.channels, s.c_out, true},
        pointwise_(wanted.depthwise_out ? packed(filter_, s.dtype) : Scratch()),
        streams_(s.g.nhwc && wanted.depthwise_out &&
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
  bool inner() const { return s_.inner != Activation::none; }
  bool makes_depthwise() const { return wanted_.pointwise || (wanted_.depthwise_out && inner()); }

  // A band's rows. own: of one image's after the other.
  struct Workspace {
    explicit Workspace(const BandsBackward& b)
        : dz(b.activated_ || !b.s_.g.nhwc ? b.rows(b.s_.c_out) : 0),
          depthwise_out(b.makes_depthwise() ? b.rows(b.s_.g.channels) : 0),
          hidden(b.wanted_.pointwise && b.inner() ? b.rows(b.s_.g.channels) : 0),
          own(b.s_.g.nhwc ? 0 : b.own_size()),
          factors(b.sums_.scratch()) {}
    const Scratch dz, depthwise_out, hidden, own, factors;
  };
  int64_t rows(int64_t channels) const { return bands_.most_pixels() * channels * size_of(s_.dtype); }
  int64_t own_size() const {
    return std::max(rows(std::max(s_.g.channels, s_.c_out)), bands_.most_read() * s_.g.channels * size_of(s_.dtype));
  }

  void add_band(const Band& band, int64_t task, bool first, const Workspace& work) {
    const int64_t n = band.pixels, c = s_.g.channels, c_out = s_.c_out;
    const Kernels& k = kernels(s_.dtype);
    void* const own = work.own.as();
    const void* dz = grad_.read(band.out, work.dz.as());
    if (activated_) {
      const void* y = y_.read(band.out, own);
      k.activation_backward(dz, y, s_.outer, true, work.dz.as(), n * c_out);
      dz = work.dz.as();
    }
    if (wanted_.pointwise_bias) k.add_column_sums(dz, bias_sums_.data() + task * c_out, n, c_out);
    if (makes_depthwise())
      k.depthwise_packed(band.g, x_.read(band.in, own), depthwise_, Activation::none, x_.bytes(),
                         work.depthwise_out.as());
    if (wanted_.pointwise) {
      const void* hidden = work.depthwise_out.as();
      if (inner()) {
        k.epilogue(hidden, nullptr, s_.inner, work.hidden.as(), n, c);
        hidden = work.hidden.as();
      }
      sums_.add(task, first, dz, hidden, n, work.factors);
    }
    if (!wanted_.depthwise_out) return;
    void* out = depthwise_out_.made_at(band.out, own);
    k.pointwise_rows({dz, out, n, c_out, c, Activation::none, streams_}, 0, filter_.blocks(), pointwise_.as<float>());
    if (inner()) k.activation_backward(out, work.depthwise_out.as(), s_.inner, false, out, n * c);
    depthwise_out_.written(band.out, own);
  }

  const Separable& s_;
  const bool activated_;
  const Gradients wanted_;
  const Bands bands_;
  const BandImages grad_, y_, x_, depthwise_out_;
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
