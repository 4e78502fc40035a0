#include "cpu/separable/pointwise.h"

#include <vector>

#include "cpu/separable/band.h"

namespace rkl::cpu {
namespace {

Tensor convolution(const Tensor& image, const Tensor& filter, const std::optional<Tensor>& bias) {
  const std::vector<int64_t> none{0, 0}, ones{1, 1};
  return aten("aten::mkldnn_convolution", "", image, as_filter(filter), bias, none, ones, ones, int64_t(1));
}

// A pointwise step by the kernels here.
struct Step {
  PointwiseFilter filter;
  const void* in;
  void* out;
  int64_t rows;
  Activation act;
  Dtype dtype;

  int64_t grain(int64_t task_rows, int64_t task_outputs) const {
    return kThreadOperations / (2 * task_rows * filter.channels * task_outputs + 1) + 1;
  }
  void make(int64_t first, int64_t count, int64_t block, int64_t end_block, const float* packed, bool streams) const {
    const int64_t c = filter.channels, c_out = filter.outputs;
    kernels(dtype).pointwise_rows(
        {at(in, first * c, dtype), at(out, first * c_out, dtype), count, c, c_out, c_out, act, streams, nullptr}, block,
        end_block, packed);
  }
};

// For few rows: a task makes a block of outputs, and packs that block of the filter first. Packing a whole filter takes
// as long as some 30 rows.
void by_blocks(const Step& s) {
  const int64_t blocks = s.filter.blocks();
  const Scratch packed(s.filter.packed_size() * sizeof(float));
  torch::stable::parallel_for(0, blocks, s.grain(s.rows, PointwiseFilter::kOutputs), [&](int64_t begin, int64_t end) {
    kernels(s.dtype).pack_pointwise(s.filter, begin, end, packed.as<float>());
    s.make(0, s.rows, begin, end, packed.as<float>(), false);
  });
}

// Cuts rows into parts, and outputs too where there are few parts.
void by_rows(const Step& s) {
  const int64_t blocks = s.filter.blocks(), rows = rows_a_part(s.rows, s.filter.channels, s.dtype, kLeastRows / 2);
  const int64_t parts = ceil_div(s.rows, rows),
                across = std::clamp<int64_t>(kTasks / std::max<int64_t>(parts, 1), 1, blocks);
  const Scratch filter = packed(s.filter, s.dtype);
  const bool streams = streams_rows(s.out, s.rows, s.filter.outputs, s.act, s.dtype);
  const int64_t grain = s.grain(rows, ceil_div(s.filter.outputs, across));
  torch::stable::parallel_for(0, parts * across, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / across * rows, column = i % across;
      s.make(first, std::min(rows, s.rows - first), blocks * column / across, blocks * (column + 1) / across,
             filter.as<float>(), streams);
    }
  });
}

Tensor multiplied(const Tensor& image, const Tensor& filter, const std::optional<Tensor>& bias, Activation act) {
  constexpr int64_t kFewRows = 512;
  const int64_t n = image.size(0), h = image.size(2), w = image.size(3), c = image.size(1), c_out = filter.size(0);
  const Tensor out = empty_image(image, n, c_out, h, w, true);
  const bool by_channel = filter.stride(0) == 1 && filter.stride(1) == c_out;
  const Tensor weight = by_channel ? filter : as_contiguous(filter);
  const Step step{{weight.const_data_ptr(), data_or_null(bias), c_out, c, by_channel},
                  image.const_data_ptr(),
                  out.mutable_data_ptr(),
                  n * h * w,
                  act,
                  dtype_of(image, "image")};
  const auto by = step.rows <= kFewRows && step.filter.blocks() >= kTasks / 2 ? by_blocks : by_rows;
  by(step);
  return out;
}

Tensor convolved(const Tensor& image, const Tensor& filter, const std::optional<Tensor>& bias) {
  const Dtype dtype = dtype_of(image, "image");
  if (factor_type(dtype) == dtype) return dense(convolution(image, filter, bias), true);
  const auto wide = [](const Tensor& x) { return torch::stable::to(x, ScalarType::Float); };
  const std::optional<Tensor> wide_bias = bias ? std::optional<Tensor>(wide(*bias)) : std::nullopt;
  return torch::stable::to(convolved(wide(image), wide(filter), wide_bias), image.scalar_type());
}

}  // namespace

bool convolves_images(int64_t channels) { return channels && OneThread::holds() && has_library(); }

Scratch packed(const PointwiseFilter& filter, Dtype dtype) {
  Scratch out(filter.packed_size() * sizeof(float));
  torch::stable::parallel_for(0, filter.blocks(), kGrain / filter.block_size() + 1, [&](int64_t begin, int64_t end) {
    kernels(dtype).pack_pointwise(filter, begin, end, out.as<float>());
  });
  return out;
}

bool makes_pointwise(int64_t channels, Dtype dtype) {
  return multiplies_rows(channels, dtype) || convolves_images(channels);
}

Tensor pointwise(const Tensor& image, const Tensor& filter, const std::optional<Tensor>& bias, Activation act) {
  const Dtype dtype = dtype_of(image, "image");
  if (multiplies_rows(image.size(1), dtype)) return multiplied(image, filter, bias, act);
  const Tensor out = convolved(image, filter, bias);
  void* const memory = out.mutable_data_ptr();
  if (act != Activation::none) kernels(dtype).epilogue(memory, nullptr, act, memory, out.numel(), 1);
  return out;
}

}  // namespace rkl::cpu
