#include "cpu/separable/pointwise.h"

#include <vector>

#include "cpu/separable/band.h"

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

// Operations that a thread takes at least: some 20 us, what waking it costs.
constexpr int64_t kThreadOperations = int64_t(1) << 21;

// By the kernels here: rows of channels in parts. Of few rows by blocks of outputs, each packed by the task that makes
// it: to pack all of a filter first takes as long as some 30 rows do.
Tensor product(const Tensor& image, const Tensor& weight, const std::optional<Tensor>& bias, Activation act) {
  constexpr int64_t kFewRows = 512;
  const Dtype dtype = dtype_of(image, "image");
  const Kernels& k = kernels(dtype);
  const int64_t n = image.size(0), h = image.size(2), w = image.size(3), c = image.size(1), c_out = weight.size(0);
  const Tensor out = empty_image(image, n, c_out, h, w, true);
  const bool by_channel = weight.stride(0) == 1 && weight.stride(1) == c_out;
  const Tensor values = by_channel ? weight : as_contiguous(weight);
  const PointwiseFilter filter{values.const_data_ptr(), data_or_null(bias), c_out, c, by_channel};
  const int64_t all = n * h * w, blocks = filter.blocks();
  if (all <= kFewRows && blocks >= kTasks / 2) {
    const Scratch packed(blocks * filter.block_size() * sizeof(float));
    const int64_t grain = kThreadOperations / (2 * all * c * PointwiseFilter::kOutputs + 1) + 1;
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        k.pack_pointwise(filter, i, i + 1, packed.as<float>(), dtype);
        k.pointwise_rows({image.const_data_ptr(), out.mutable_data_ptr(), all, c, c_out, act}, i, i + 1,
                         packed.as<float>(), dtype);
      }
    });
    return out;
  }
  const Scratch packed = rkl::cpu::packed(filter, dtype);
  const int64_t rows = rows_a_part(all, c, dtype, kLeastRows / 2), parts = ceil_div(all, rows);
  const int64_t across = std::min(ceil_div(kTasks, std::max<int64_t>(1, parts)), blocks);
  const int64_t grain = kThreadOperations / (2 * rows * c * ceil_div(c_out, across)) + 1;
  torch::stable::parallel_for(0, parts * across, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / across * rows, column = i % across;
      const PointwiseRows part{at(image.const_data_ptr(), first * c, dtype),
                               at(out.mutable_data_ptr(), first * c_out, dtype),
                               std::min(rows, all - first),
                               c,
                               c_out,
                               act};
      k.pointwise_rows(part, blocks * column / across, blocks * (column + 1) / across, packed.as<float>(), dtype);
    }
  });
  return out;
}

Tensor convolved(const Tensor& image, const Tensor& filter, const std::optional<Tensor>& bias, bool nhwc) {
  const Dtype dtype = dtype_of(image, "image");
  if (factor_type(dtype) == dtype) return dense(convolution(image, filter, bias), nhwc);
  const auto wide = [](const Tensor& x) { return torch::stable::to(x, ScalarType::Float); };
  const std::optional<Tensor> wide_bias = bias ? std::optional<Tensor>(wide(*bias)) : std::nullopt;
  return torch::stable::to(convolved(wide(image), wide(filter), wide_bias, nhwc), image.scalar_type());
}

}  // namespace

bool convolves_images(int64_t channels) { return channels && OneThread::holds() && has_convolution(); }

Scratch packed(const PointwiseFilter& filter, Dtype dtype) {
  Scratch out(filter.blocks() * filter.block_size() * sizeof(float));
  torch::stable::parallel_for(
      0, filter.blocks(), (int64_t(1) << 15) / filter.block_size() + 1,
      [&](int64_t begin, int64_t end) { kernels(dtype).pack_pointwise(filter, begin, end, out.as<float>(), dtype); });
  return out;
}

bool makes_pointwise(int64_t channels, bool nhwc, Dtype dtype) {
  return (nhwc && multiplies_rows(channels, dtype)) || convolves_images(channels);
}

Tensor pointwise(const Tensor& image, const Tensor& filter, const std::optional<Tensor>& bias, Activation act,
                 bool nhwc) {
  const Dtype dtype = dtype_of(image, "image");
  if (nhwc && multiplies_rows(image.size(1), dtype)) return product(image, filter, bias, act);
  const Tensor out = convolved(image, filter, bias, nhwc);
  void* const memory = out.mutable_data_ptr();
  if (act != Activation::none) kernels(dtype).epilogue(memory, nullptr, act, memory, out.numel(), 1, dtype);
  return out;
}

}  // namespace rkl::cpu
