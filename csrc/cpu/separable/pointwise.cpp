#include "cpu/separable/pointwise.h"

#include <vector>

#include "cpu/separable/matrix.h"

namespace rkl::cpu {
namespace {

using Ints = std::vector<int64_t>;

Tensor convolution(const Tensor& image, const Tensor& filter, const std::optional<Tensor>& bias) {
  const Ints none{0, 0}, ones{1, 1};
  return aten("aten::mkldnn_convolution", "", image, as_filter(filter), bias, none, ones, ones, int64_t(1));
}

bool has_convolution() {
  static const bool has = [] {
    const Ints size{1, 1, 1, 1};
    const IntList ones(size.data(), size.size());
    float one = 1;
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    const Tensor x = torch::stable::from_blob(&one, ones, ones, cpu, ScalarType::Float);
    try {
      convolution(x, x, std::nullopt);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return has;
}

}  // namespace

bool convolves_images(int64_t channels) { return channels && OneThread::holds() && has_convolution(); }

Tensor pointwise(const Tensor& image, const Tensor& filter, const std::optional<Tensor>& bias, bool nhwc) {
  const Dtype dtype = dtype_of(image, "image");
  if (factor_type(dtype) != dtype) {
    const auto wide = [](const Tensor& x) { return torch::stable::to(x, ScalarType::Float); };
    const std::optional<Tensor> wide_bias = bias ? std::optional<Tensor>(wide(*bias)) : std::nullopt;
    return torch::stable::to(pointwise(wide(image), wide(filter), wide_bias, nhwc), image.scalar_type());
  }
  // The inner product begins 20 us sooner, which counts where pixels or operations are few: 512 to 512 channels, 512
  // pixels, 0.55 ms against the convolution's 0.59; 32 to 192 channels, 784 pixels, bf16, 67 us against 87. In fp32 it
  // is also the faster one of small products with a transposed filter, which it need not pack: the image's gradient of
  // 256 to 256 channels, 2048 pixels, 0.55 ms against 0.63.
  constexpr int64_t kFewPixels = 512, kFewOperations = 20000000, kSmall = 1000000000;
#if defined(__x86_64__)
  constexpr bool kSteady = true;
#else
  constexpr bool kSteady = false;  // by Arm's library the inner product's sums follow the number of threads
#endif
  const int64_t rows = image.size(0) * image.size(2) * image.size(3), c = image.size(1), c_out = filter.size(0);
  const int64_t operations = 2 * rows * c * c_out;
  const bool packed = dtype == Dtype::f32 && filter.stride(0) == 1 && operations <= kSmall;
  if (kSteady && nhwc && (rows <= kFewPixels || operations <= kFewOperations || packed))
    return image_of_rows(linear(pixel_rows(image), filter, bias), image.size(0), image.size(2), image.size(3));
  return dense(convolution(image, filter, bias), nhwc);
}

}  // namespace rkl::cpu
