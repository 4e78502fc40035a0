// Sums over pixels: each task has its own, and they are added in the tasks' order, so that results do not depend on the
// number of threads.
#pragma once
#include <vector>

#include "cpu/separable/band.h"

namespace rkl::cpu {

// Of (rows, columns) values the sum of `count` shares, in their order and in fp64: floats from one share, one row and
// one block of columns to the next.
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

// Shares that are dense matrices.
inline ShareStrides dense_shares(int64_t rows, int64_t columns) {
  return {rows * columns, columns, PointwiseFilter::kOutputs};
}

// The pointwise filter's gradient, in tasks of a part of the pixels and a part of the filter each.
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
  // Which part of the pixels.
  int64_t pixels(int64_t task) const { return task / shares_.filter; }

  // Memory of a worker's own, for `add`.
  Scratch scratch() const { return Scratch(share(part(0)).scratch_size() * int64_t(sizeof(float))); }

  // A task's share of some of its pixels, or its first: of whole rows of dz and of the depthwise output.
  void add(int64_t task, bool first, const void* dz, const void* hidden, int64_t pixels, const Scratch& scratch) const {
    const Part here = part(task);
    PointwiseShare sums = share(here);
    sums.dz = at(dz, here.output, dtype_);
    sums.hidden = at(hidden, here.channel, dtype_);
    sums.pixels = pixels;
    sums.fresh = first;
    sums.scratch = scratch.as<float>();
    if (here.outputs && here.channels) kernels(dtype_).add_pointwise_share(sums);
  }

  void round_into(void* out) const {
    const ShareStrides strides{share_size(), kBlock, c_out_ * kBlock};
    round_shares(sums_.as<float>(), shares_.pixels, c_out_, c_, strides, out, dtype_);
  }

 private:
  struct Part {
    int64_t pixels, output, outputs, channel, channels;
  };

  static constexpr int64_t kBlock = PointwiseFilter::kOutputs;
  int64_t share_size() const { return ceil_div(c_, kBlock) * kBlock * c_out_; }

  // Of whole blocks, so that no two tasks write to one.
  Part part(int64_t task) const {
    const int64_t longer = std::max(c_, c_out_), most = ceil_div(ceil_div(longer, kBlock), shares_.filter) * kBlock;
    const int64_t first = std::min(task % shares_.filter * most, longer), count = std::min(most, longer - first);
    return c_out_ >= c_ ? Part{pixels(task), first, count, 0, c_} : Part{pixels(task), 0, c_out_, first, count};
  }

  PointwiseShare share(const Part& part) const {
    const int64_t first = part.pixels * share_size() + part.channel * c_out_ + part.output * kBlock;
    return {nullptr,         nullptr, c_out_, c_,     0, part.outputs, part.channels, sums_.as<float>() + first,
            c_out_ * kBlock, false,   piece_, nullptr};
  }

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
  kernels(dtype).round(total.data(), out, channels);
}

}  // namespace rkl::cpu
