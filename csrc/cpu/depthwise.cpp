// Depthwise convolution on the CPU, forward and backward: one output a time, any window, either layout.
#include <torch/csrc/stable/ops.h>

#include "cpu/element.h"
#include "cpu/kernels.h"

namespace rkl::cpu {
namespace {

// Where pixel (n, c, h, w) lies in a dense image.
struct Image {
  int64_t channels, height, width;
  bool nhwc;
  int64_t at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return nhwc ? ((n * height + h) * width + w) * channels + c : ((n * channels + c) * height + h) * width + w;
  }
};

Image input(const Conv2d& g) { return {g.channels, g.in_h, g.in_w, g.nhwc}; }
Image output(const Conv2d& g) { return {g.channels, g.out_h, g.out_w, g.nhwc}; }

// Calls f(tap, oh, ow) for every output pixel that input pixel (h, w) takes part in.
template <class F>
void for_outputs_of(const Conv2d& g, int64_t h, int64_t w, F&& f) {
  for (int kh = 0; kh < g.kernel_h; ++kh) {
    const int64_t top = h + g.padding_h - int64_t(kh) * g.dilation_h;
    if (top < 0 || top % g.stride_h || top / g.stride_h >= g.out_h) continue;
    for (int kw = 0; kw < g.kernel_w; ++kw) {
      const int64_t left = w + g.padding_w - int64_t(kw) * g.dilation_w;
      if (left < 0 || left % g.stride_w || left / g.stride_w >= g.out_w) continue;
      f(kh * g.kernel_w + kw, top / g.stride_h, left / g.stride_w);
    }
  }
}

// Calls f(tap, h, w) for every input pixel inside the image that output pixel (oh, ow) sees.
template <class F>
void for_inputs_of(const Conv2d& g, int64_t oh, int64_t ow, F&& f) {
  for (int kh = 0; kh < g.kernel_h; ++kh) {
    const int64_t h = oh * g.stride_h - g.padding_h + int64_t(kh) * g.dilation_h;
    if (h < 0 || h >= g.in_h) continue;
    for (int kw = 0; kw < g.kernel_w; ++kw) {
      const int64_t w = ow * g.stride_w - g.padding_w + int64_t(kw) * g.dilation_w;
      if (w >= 0 && w < g.in_w) f(kh * g.kernel_w + kw, h, w);
    }
  }
}

template <class T>
void data_gradient(const Conv2d& g, const T* grad, const T* weight, T* dx) {
  const Image in = input(g), out = output(g);
  torch::stable::parallel_for(0, g.batch * g.channels, 1, [=](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / g.channels, c = plane % g.channels;
      const T* filter = weight + c * g.kernel_h * g.kernel_w;
      for (int64_t h = 0; h < g.in_h; ++h)
        for (int64_t w = 0; w < g.in_w; ++w) {
          float sum = 0;
          for_outputs_of(g, h, w, [&](int tap, int64_t oh, int64_t ow) {
            sum += float(filter[tap]) * float(grad[out.at(n, c, oh, ow)]);
          });
          dx[in.at(n, c, h, w)] = T(sum);
        }
    }
  });
}

template <class T>
void weight_gradient(const Conv2d& g, const T* grad, const T* x, T* dweight, T* dbias) {
  const Image in = input(g), out = output(g);
  const int taps = g.kernel_h * g.kernel_w;
  torch::stable::parallel_for(0, g.channels, 1, [=](int64_t begin, int64_t end) {
    std::vector<double> sums(taps + 1);
    for (int64_t c = begin; c < end; ++c) {
      std::fill(sums.begin(), sums.end(), 0.);
      for (int64_t n = 0; n < g.batch; ++n)
        for (int64_t oh = 0; oh < g.out_h; ++oh)
          for (int64_t ow = 0; ow < g.out_w; ++ow) {
            const float d = float(grad[out.at(n, c, oh, ow)]);
            sums[taps] += d;
            for_inputs_of(g, oh, ow,
                          [&](int tap, int64_t h, int64_t w) { sums[tap] += d * float(x[in.at(n, c, h, w)]); });
          }
      for (int tap = 0; dweight && tap < taps; ++tap) dweight[c * taps + tap] = T(float(sums[tap]));
      if (dbias) dbias[c] = T(float(sums[taps]));
    }
  });
}

}  // namespace

void depthwise(const Conv2d& g, const void* x, const void* weight, const void* bias, Activation act, void* y,
               Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *from = static_cast<const T*>(x), *filters = static_cast<const T*>(weight);
    const T* b = static_cast<const T*>(bias);
    T* to = static_cast<T*>(y);
    const Image in = input(g), out = output(g);
    torch::stable::parallel_for(0, g.batch * g.channels, 1, [=](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t n = plane / g.channels, c = plane % g.channels;
        const T* filter = filters + c * g.kernel_h * g.kernel_w;
        for (int64_t oh = 0; oh < g.out_h; ++oh)
          for (int64_t ow = 0; ow < g.out_w; ++ow) {
            float sum = b ? float(b[c]) : 0.f;
            for_inputs_of(g, oh, ow, [&](int tap, int64_t h, int64_t w) {
              sum += float(filter[tap]) * float(from[in.at(n, c, h, w)]);
            });
            to[out.at(n, c, oh, ow)] = T(activate(act, sum));
          }
      }
    });
  });
}

void depthwise_backward(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx, void* dweight,
                        void* dbias, Dtype dtype) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* d = static_cast<const T*>(grad);
    if (dx) data_gradient(g, d, static_cast<const T*>(weight), static_cast<T*>(dx));
    if (dweight || dbias)
      weight_gradient(g, d, static_cast<const T*>(x), static_cast<T*>(dweight), static_cast<T*>(dbias));
  });
}

}  // namespace rkl::cpu
