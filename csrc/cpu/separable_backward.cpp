// The gradients of a separable convolution's pointwise step and of its depthwise output, which is made again band by
// band rather than kept.
#include <vector>

#include "cpu/separable_sums.h"

namespace rkl::cpu {
namespace {

// What a task has at hand for its bands; fp32 copies of the factors where the library wants them widened.
struct Workspace {
  Scratch dz, before, inner, filter, wide_dz, wide_inner, wide_d_inner;
};

class PointwiseBackward {
 public:
  PointwiseBackward(const Separable& s, const void* grad, const void* y, const PointwiseGradients& wanted)
      : s_(s),
        grad_(grad),
        y_(y),
        wanted_(wanted),
        factor_(factor_type(s.dtype)),
        whole_(wanted.pointwise && s.dtype != Dtype::f32 && factor_ == s.dtype),
        bands_(s, backward_pixels(s, factor_)),
        tasks_(std::min(bands_.count(), backward_tasks(s))),
        depthwise_(kernels(s.dtype).pack_filter(s.g, s.depthwise, s.depthwise_bias, s.dtype)),
        pointwise_(s, factor_),
        bias_sums_(wanted.pointwise_bias ? tasks_ * s.c_out : 0) {
    const int64_t pixels = s.g.batch * s.g.out_h * s.g.out_w, size = size_of(s.dtype);
    if (whole_) {
      inner_ = Scratch(pixels * s.g.channels * size);
      if (y) dz_ = Scratch(pixels * s.c_out * size);
    } else if (wanted.pointwise) {
      sums_ = TaskSums(tasks_, filter_size());
    }
  }

  void operator()() {
    for_tasks(tasks_, [&](int64_t begin, int64_t end) {
      const Workspace work = workspace();
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = bands_.count() * task / tasks_, last = bands_.count() * (task + 1) / tasks_;
        for (int64_t i = first; i < last; ++i) band(bands_[i], task, i == first, work);
      }
    });
    if (wanted_.pointwise) whole_ ? multiply_whole() : sums_.round_into(wanted_.pointwise, s_.dtype);
    if (wanted_.pointwise_bias) round_bias(bias_sums_, s_, wanted_.pointwise_bias);
  }

 private:
  bool widens() const { return factor_ != s_.dtype; }
  bool has_inner() const { return wanted_.pointwise || (wanted_.inner && s_.inner != Activation::none); }
  int64_t filter_size() const { return s_.c_out * s_.g.channels; }

  Workspace workspace() const {
    const int64_t pixels = bands_.most_pixels(), c = s_.g.channels, size = size_of(s_.dtype);
    const bool activated = has_inner() && s_.inner != Activation::none;
    Workspace w;
    if (y_ && !dz_.as()) w.dz = Scratch(pixels * s_.c_out * size);
    if (activated) w.before = Scratch(pixels * c * size);
    if (has_inner() && !whole_) w.inner = Scratch(pixels * c * size);
    if (wanted_.pointwise && !whole_) w.filter = Scratch(filter_size() * sizeof(float));
    if (!widens()) return w;
    w.wide_dz = Scratch(pixels * s_.c_out * sizeof(float));
    if (wanted_.pointwise) w.wide_inner = Scratch(pixels * c * sizeof(float));
    if (wanted_.inner) w.wide_d_inner = Scratch(pixels * c * sizeof(float));
    return w;
  }

  // The factor as the library is to have it.
  Matrix factor(const void* values, int64_t rows, int64_t columns, const Scratch& wide) const {
    if (!widens()) return matrix(values, factor_, rows, columns);
    kernels(s_.dtype).widen(values, wide.as<float>(), rows * columns, s_.dtype);
    return matrix(wide.as(), factor_, rows, columns);
  }

  void band(const Band& b, int64_t task, bool first_of_task, const Workspace& work) {
    const int64_t n = b.pixels, c = s_.g.channels, c_out = s_.c_out;
    const void* dz = at(grad_, b.first_pixel * c_out, s_.dtype);
    if (y_) {
      void* to = dz_.as() ? at(dz_.as(), b.first_pixel * c_out, s_.dtype) : work.dz.as();
      kernels(s_.dtype).slope(dz, at(y_, b.first_pixel * c_out, s_.dtype), s_.outer, true, to, n * c_out, s_.dtype);
      dz = to;
    }
    if (wanted_.pointwise_bias)
      kernels(s_.dtype).add_column_sums(dz, bias_sums_.data() + task * c_out, n, c_out, s_.dtype);

    const bool activated = s_.inner != Activation::none;
    void* inner = whole_ ? at(inner_.as(), b.first_pixel * c, s_.dtype) : work.inner.as();
    if (has_inner()) {
      void* before = activated ? work.before.as() : inner;
      depthwise_band(s_, b, depthwise_, Activation::none, before);
      if (activated) kernels(s_.dtype).finish({before, nullptr, inner, n, c, c, c}, s_.inner, s_.dtype, s_.dtype);
    }
    if (!wanted_.inner && (!wanted_.pointwise || whole_)) return;

    const Matrix dz_factor = factor(dz, n, c_out, work.wide_dz);
    if (wanted_.pointwise && !whole_) {
      const Matrix right = factor(inner, n, c, work.wide_inner);
      const Product product(transposed(dz_factor), right, matrix(work.filter.as(), Dtype::f32, c_out, c));
      sums_.add(task, first_of_task, product.matrix());
    }
    if (!wanted_.inner) return;
    void* d_inner = at(wanted_.inner, b.first_pixel * c, s_.dtype);
    const Matrix wanted = matrix(widens() ? work.wide_d_inner.as() : d_inner, factor_, n, c);
    const Product product(dz_factor, pointwise_.matrix(), wanted);
    const void* z = product.matrix().data;
    if (z != d_inner) kernels(s_.dtype).finish({z, nullptr, d_inner, n, c, c, c}, Activation::none, factor_, s_.dtype);
    if (activated) kernels(s_.dtype).slope(d_inner, work.before.as(), s_.inner, false, d_inner, n * c, s_.dtype);
  }

  // In 16 bits the library's results are 16 bits too: bands' sums would be rounded each, so that all pixels go into one
  // product, shared out by its rows.
  void multiply_whole() {
    const int64_t pixels = s_.g.batch * s_.g.out_h * s_.g.out_w, c = s_.g.channels, c_out = s_.c_out;
    // Each part reads all of the other factor: 200704 x 64 by 32, 10.5 ms by 16 rows, 5.6 in one.
    const int64_t rows = std::max<int64_t>(32, (c_out + kTasks - 1) / kTasks);
    const void* dz = dz_.as() ? dz_.as() : grad_;
    for_tasks((c_out + rows - 1) / rows, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * rows; first < end * rows && first < c_out; first += rows) {
        const int64_t count = std::min(rows, c_out - first);
        const Matrix left{const_cast<void*>(at(dz, first, s_.dtype)), factor_, count, pixels, 1, c_out};
        Product(left, matrix(inner_.as(), factor_, pixels, c),
                matrix(at(wanted_.pointwise, first * c, s_.dtype), factor_, count, c));
      }
    });
  }

  const Separable& s_;
  const void *grad_, *y_;
  const PointwiseGradients wanted_;
  const Dtype factor_;
  const bool whole_;  // the filter's gradient in one product
  const Bands bands_;
  const int64_t tasks_;
  const PackedFilter depthwise_;
  const PointwiseFilter pointwise_;
  std::vector<double> bias_sums_;  // (task, C')
  Scratch inner_, dz_;             // of all pixels
  TaskSums sums_;                  // the filter's gradient
};

}  // namespace

void pointwise_backward(const Separable& s, const void* grad, const void* y, const PointwiseGradients& wanted) {
  s.g.nhwc ? PointwiseBackward(s, grad, y, wanted)() : pointwise_backward_planes(s, grad, y, wanted);
}

}  // namespace rkl::cpu
