// Separable convolution of NCHW images where they lie: an image is a matrix of channels by pixels, and so the pointwise
// step is filter times image. Its gradients need no transposition either: d_image = filter^T d_out, and the filter's is
// d_out image^T.
#include <cstring>

#include "cpu/separable/pointwise.h"
#include "cpu/separable/task_sums.h"

namespace rkl::cpu {
namespace {

int64_t pixels_of(const Separable& s) { return s.g.out_h * s.g.out_w; }

// One image's depthwise step.
void depthwise_image(const Separable& s, int64_t image, const PackedFilter& filter, Activation act, void* out) {
  Conv2d one = s.g;
  one.batch = 1;
  const void* x = at(s.x, image * s.g.channels * s.g.in_h * s.g.in_w, s.dtype);
  kernels(s.dtype).depthwise_packed(one, x, filter, act, out, s.dtype);
}

// `count` pixels of an image's output from the first one on, from as many of its depthwise output, (C, count).
void pointwise(const Separable& s, int64_t image, const void* hidden, void* y, int64_t first, int64_t count) {
  const int64_t n = pixels_of(s), c = s.g.channels;
  void* out = at(y, image * s.c_out * n + first, s.dtype);
  const Product product(matrix(s.pointwise, s.dtype, s.c_out, c), matrix(hidden, s.dtype, c, count),
                        {out, s.dtype, s.c_out, count, n, 1});
  const Matrix& z = product.matrix();
  if (z.data == out && !s.pointwise_bias && s.outer == Activation::none) return;
  kernels(s.dtype).finish({z.data, s.pointwise_bias, out, s.c_out, count, z.row_stride, n, true}, s.outer, s.dtype,
                          s.dtype);
}

// The library packs the whole filter anew for each part, which takes as long as some 25 pixels do.
constexpr int64_t kLeastPixels = 128;

// Few images: the pixels of each are shared out, copied together for the library.
void by_parts(const Separable& s, void* y) {
  const int64_t n = pixels_of(s), c = s.g.channels, size = size_of(s.dtype);
  const Scratch hidden(s.g.batch * n * c * size);
  kernels(s.dtype).depthwise(s.g, s.x, s.depthwise, s.depthwise_bias, s.inner, hidden.as(), s.dtype);
  const int64_t part = std::min(n, std::max(ceil_div(n, kTasks), kLeastPixels)), parts = ceil_div(n, part);
  for_tasks(s.g.batch * parts, [&](int64_t begin, int64_t end) {
    const Scratch dense(part * c * size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / parts, first = i % parts * part, count = std::min(part, n - first);
      for (int64_t channel = 0; channel < c; ++channel)
        std::memcpy(at(dense.as(), channel * count, s.dtype),
                    at(hidden.as(), (image * c + channel) * n + first, s.dtype), count * size);
      pointwise(s, image, dense.as(), y, first, count);
    }
  });
}

class ImagesBackward {
 public:
  ImagesBackward(const Separable& s, const void* grad, const void* y, const Gradients& wanted)
      : s_(s),
        grad_(grad),
        y_(y),
        wanted_(wanted),
        tasks_(std::min(s.g.batch, kTasks)),
        depthwise_(kernels(s.dtype).pack_filter(s.g, s.depthwise, s.depthwise_bias, s.dtype)),
        bias_sums_(wanted.pointwise_bias ? tasks_ * s.c_out : 0),
        sums_(wanted.pointwise ? tasks_ : 0, s.c_out, s.g.channels) {
    if (s.dtype != Dtype::f32 || !wanted.depthwise_out) return;
    transposed_filter_ = Scratch(s.c_out * s.g.channels * sizeof(float));
    kernels(s.dtype).transpose(static_cast<const float*>(s.pointwise), transposed_filter_.as<float>(), s.c_out,
                               s.g.channels);
  }

  void operator()() {
    for_tasks(tasks_, [&](int64_t begin, int64_t end) {
      const Workspace work(*this);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = s_.g.batch * task / tasks_, last = s_.g.batch * (task + 1) / tasks_;
        for (int64_t image = first; image < last; ++image) add_image(image, task, image == first, work);
      }
    });
    if (wanted_.pointwise) sums_.round_into(wanted_.pointwise, s_.dtype);
    if (wanted_.pointwise_bias) round_bias(bias_sums_, s_.c_out, wanted_.pointwise_bias, s_.dtype);
  }

 private:
  bool activated() const { return s_.inner != Activation::none; }
  bool has_depthwise_out() const { return wanted_.pointwise || (wanted_.depthwise_out && activated()); }

  // One image's matrices; fp32 copies of the filter gradient's factors in 16 bits, whose sums must not be rounded.
  struct Workspace {
    explicit Workspace(const ImagesBackward& b) {
      const int64_t n = pixels_of(b.s_), c = b.s_.g.channels, c_out = b.s_.c_out, size = size_of(b.s_.dtype);
      if (b.y_) dz = Scratch(n * c_out * size);
      if (b.has_depthwise_out()) depthwise_out = Scratch(n * c * size);
      if (b.wanted_.pointwise && b.activated()) hidden = Scratch(n * c * size);
      if (!b.wanted_.pointwise) return;
      share = Scratch(c * c_out * sizeof(float));
      if (b.s_.dtype == Dtype::f32) return;
      wide_dz = Scratch(n * c_out * sizeof(float));
      wide_hidden = Scratch(n * c * sizeof(float));
    }
    Scratch dz, depthwise_out, hidden, share, wide_dz, wide_hidden;
  };

  Matrix wide(const void* values, int64_t rows, const Scratch& copy) const {
    const int64_t n = pixels_of(s_);
    if (s_.dtype == Dtype::f32) return matrix(values, s_.dtype, rows, n);
    kernels(s_.dtype).widen(values, copy.as<float>(), rows * n, s_.dtype);
    return matrix(copy.as(), Dtype::f32, rows, n);
  }

  void add_image(int64_t image, int64_t task, bool first, const Workspace& work) {
    const int64_t n = pixels_of(s_), c = s_.g.channels, c_out = s_.c_out;
    const Kernels& k = kernels(s_.dtype);
    const void* dz = at(grad_, image * c_out * n, s_.dtype);
    if (y_) {
      k.activation_backward(dz, at(y_, image * c_out * n, s_.dtype), s_.outer, true, work.dz.as(), n * c_out, s_.dtype);
      dz = work.dz.as();
    }
    if (wanted_.pointwise_bias) k.add_row_sums(dz, bias_sums_.data() + task * c_out, c_out, n, s_.dtype);
    if (has_depthwise_out()) depthwise_image(s_, image, depthwise_, Activation::none, work.depthwise_out.as());
    if (wanted_.pointwise) {
      const void* hidden = work.depthwise_out.as();
      if (activated()) {
        k.finish({hidden, nullptr, work.hidden.as(), c, n, n, n, true}, s_.inner, s_.dtype, s_.dtype);
        hidden = work.hidden.as();
      }
      const Matrix left = wide(dz, c_out, work.wide_dz), right = wide(hidden, c, work.wide_hidden);
      const Product product(left, transposed(right), matrix(work.share.as(), Dtype::f32, c_out, c));
      sums_.add(task, first, product.matrix());
    }
    if (!wanted_.depthwise_out) return;
    void* grad = at(wanted_.depthwise_out, image * c * n, s_.dtype);
    const Matrix filter = transposed_filter_.as() ? matrix(transposed_filter_.as(), s_.dtype, c, c_out)
                                                  : transposed(matrix(s_.pointwise, s_.dtype, c_out, c));
    const Product product(filter, matrix(dz, s_.dtype, c_out, n), matrix(grad, s_.dtype, c, n));
    const void* z = product.matrix().data;
    if (z != grad) k.finish({z, nullptr, grad, c, n, n, n, true}, Activation::none, s_.dtype, s_.dtype);
    if (activated()) k.activation_backward(grad, work.depthwise_out.as(), s_.inner, false, grad, n * c, s_.dtype);
  }

  const Separable& s_;
  const void *grad_, *y_;
  const Gradients wanted_;
  const int64_t tasks_;
  const PackedFilter depthwise_;
  std::vector<double> bias_sums_;  // (task, C')
  TaskSums sums_;                  // the filter's gradient
  Scratch transposed_filter_;      // fp32: the filter as (C, C'), which the library wants dense
};

}  // namespace

bool takes_planes(const Conv2d& g, Dtype dtype) { return convolves_images(g.channels) || images_serve(g, dtype); }

void separable_images(const Separable& s, void* y) {
  if (s.g.batch < kTasks) return by_parts(s, y);
  const PackedFilter filter = kernels(s.dtype).pack_filter(s.g, s.depthwise, s.depthwise_bias, s.dtype);
  for_tasks(s.g.batch, [&](int64_t begin, int64_t end) {
    const Scratch hidden(pixels_of(s) * s.g.channels * size_of(s.dtype));
    for (int64_t image = begin; image < end; ++image) {
      depthwise_image(s, image, filter, s.inner, hidden.as());
      pointwise(s, image, hidden.as(), y, 0, pixels_of(s));
    }
  });
}

void pointwise_backward_images(const Separable& s, const void* grad, const void* y, const Gradients& wanted) {
  ImagesBackward(s, grad, y, wanted)();
}

}  // namespace rkl::cpu
