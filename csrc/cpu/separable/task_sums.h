// Sums over pixels. Each task has its own sums, and they are added in the tasks' order.
#pragma once
#include <vector>

#include "cpu/separable/band.h"

namespace rkl::cpu {

// round_shares adds `count` shares of (rows, columns) values, in order and in fp64. Strides: floats from one share, one
// row and one block of columns to the next.
struct ShareStrides {
  int64_t share, row, block;
};
inline void round_shares(const float* shares, int64_t count, int64_t rows, int64_t columns, const ShareStrides& strides,
                         void* out, Dtype dtype) {
  torch::stable::parallel_for(0, rows, kGrain / (count * columns + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      kernels(dtype).sum_shares(shares + r * strides.row, count, strides.share, strides.block,
                                at(out, r * columns, dtype), columns);
  });
}

// The pointwise filter's gradient. Each task takes a part of the pixels and a part of the filter.
class FilterSums {
 public:
  FilterSums(const Shares& shares, int64_t c, int64_t c_out, Dtype dtype)
      : shares_(shares),
        c_(c),
        c_out_(c_out),
        dtype_(dtype),
        piece_(std::clamp<int64_t>(machine().l2_bytes / 2 / (c_out + PointwiseFilter::kOutputs), 256, 512)),
        sums_(shares.pixels * share_size() * int64_t(sizeof(float))) {}

  int64_t tasks() const { return shares_.pixels * shares_.filter; }
  // The part of the pixels that a task takes.
  int64_t pixels(int64_t task) const { return task / shares_.filter; }

  // Memory of a worker's own, for `add`.
  Scratch scratch() const { return Scratch(PointwiseShare::scratch_size(piece_, c_out_) * int64_t(sizeof(float))); }

  // Adds some pixels to a task's share. first: they are its first. dz, hidden: whole rows. Tasks take whole blocks of
  // outputs or channels, so that no two write to one block.
  void add(int64_t task, bool first, const void* dz, const void* hidden, int64_t pixels, const Scratch& scratch) const {
    const int64_t longer = std::max(c_, c_out_), most = ceil_div(ceil_div(longer, kBlock), shares_.filter) * kBlock;
    const int64_t begin = task % shares_.filter * most, count = std::min(most, longer - begin);
    if (count <= 0) return;
    const bool outputs = c_out_ >= c_;
    const int64_t output = outputs ? begin : 0, channel = outputs ? 0 : begin;
    float* const sums = sums_.as<float>() + this->pixels(task) * share_size() + channel * c_out_ + output * kBlock;
    kernels(dtype_).add_pointwise_share({at(dz, output, dtype_), at(hidden, channel, dtype_), c_out_, c_, pixels,
                                         outputs ? count : c_out_, outputs ? c_ : count, sums, c_out_ * kBlock, first,
                                         piece_, scratch.as<float>()});
  }

  void round_into(void* out) const {
    const ShareStrides strides{share_size(), kBlock, c_out_ * kBlock};
    round_shares(sums_.as<float>(), shares_.pixels, c_out_, c_, strides, out, dtype_);
  }

 private:
  static constexpr int64_t kBlock = PointwiseFilter::kOutputs;
  int64_t share_size() const { return ceil_div(c_, kBlock) * kBlock * c_out_; }

  const Shares shares_;
  const int64_t c_, c_out_;
  const Dtype dtype_;
  const int64_t piece_;
  const Scratch sums_;  // (part of the pixels, block of channels, output, channel of the block)
};

// The pointwise bias's gradient from the tasks' sums (task, channel).
inline void round_bias(const std::vector<double>& sums, int64_t channels, void* out, Dtype dtype) {
  std::vector<double> total(channels);
  for (size_t i = 0; i < sums.size(); ++i) total[i % channels] += sums[i];
  const std::vector<float> rounded(total.begin(), total.end());
  kernels(dtype).sum_shares(rounded.data(), 1, 0, PointwiseFilter::kOutputs, out, channels);
}

}  // namespace rkl::cpu
