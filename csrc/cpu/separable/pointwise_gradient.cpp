// The gradient of a pointwise step's filter: a sum over all pixels, in parts that the shapes alone decide, so that it
// is the same for any number of threads.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/separable/matrix.h"
#include "cpu/separable/pointwise.h"
#include "cpu/separable/task_sums.h"
#include "cpu/simd/scratch.h"

namespace rkl::cpu {
namespace {

using Ints = std::vector<int64_t>;

int64_t pixels_of(const Tensor& image) { return image.size(0) * image.size(2) * image.size(3); }

// All pixels of an NHWC image as one row of an image: a view.
Tensor as_one_row(const Tensor& image) { return image_of_rows(pixel_rows(image), 1, 1, pixels_of(image)); }

Tensor narrow(const Tensor& x, int64_t dim, int64_t first, int64_t count) {
  Tensor self = x;
  return torch::stable::narrow(self, dim, first, count);
}

// Over these images alone, on the calling thread: (C', C, 1, 1) in the images' type. In 16 bits that rounds each share;
// added up, by no more than the rounding of the factors themselves has already cost sums of random signs.
Tensor share_of(const Tensor& dz, const Tensor& hidden) {
  using torch::stable::detail::from, torch::stable::detail::to;
  const Ints size{dz.size(1), hidden.size(1), 1, 1}, ones{1, 1}, zeros{0, 0};
  // A dilation of 2 leaves a 1 x 1 filter what it is, and keeps torch from another library's way, which takes twice as
  // long and which it would choose by the number of threads.
  const Ints dilation{2, 2};
  const Tensor filter = torch::stable::new_empty(dz, IntList(size.data(), size.size()));
  const std::optional<Ints> no_bias;
  const std::array<bool, 3> filter_alone{false, true, false};
  const torch::headeronly::HeaderOnlyArrayRef<bool> mask(filter_alone.data(), filter_alone.size());
  std::array<StableIValue, 11> stack{from(dz),    from(hidden),     from(filter),   from(no_bias),
                                     from(ones),  from(zeros),      from(dilation), from(false),
                                     from(zeros), from(int64_t(1)), from(mask)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  for (int unwanted : {0, 2}) to<Tensor>(stack[unwanted]);  // frees it
  return torch::stable::contiguous(to<Tensor>(stack[1]));
}

// Pixels [first, first + count) of NHWC images: (C', C). The inner product is as fast, or faster, where a channel count
// does not divide by 16 (728 to 728, 19 px, one thread: 28 ms against 35) and of few pixels; else it takes 1.1 to 2.2
// times as long.
Tensor share_of_pixels(const Tensor& dz, const Tensor& hidden) {
  constexpr int64_t kFewPixels = 384;
  const Tensor rows = pixel_rows(dz), right = pixel_rows(hidden);
  const int64_t n = rows.size(0), c_out = rows.size(1), c = right.size(1);
  if (dtype_of(dz, "dz") != Dtype::f32 || (n > kFewPixels && c % 16 == 0 && c_out % 16 == 0))
    return share_of(dz, hidden);
  const Ints size{c_out, n};
  const Tensor left = torch::stable::new_empty(rows, IntList(size.data(), size.size()));
  kernels(Dtype::f32)
      .transpose(static_cast<const float*>(rows.const_data_ptr()), static_cast<float*>(left.mutable_data_ptr()), n,
                 c_out);
  return linear(left, torch::stable::transpose(right, 0, 1));
}

// As many parts of the pixels, each with a share of its own. A call costs 40 us, a share as much as some 100 pixels do;
// a power of 2 gives as many threads equal parts.
int64_t parts_for(int64_t pixels, int64_t c, int64_t c_out) {
  const int64_t most = std::min({2 * kTasks, 2 * pixels * c * c_out / 50000000, pixels / 1024});
  int64_t parts = 2;
  while (2 * parts <= most) parts *= 2;
  return parts;
}

// The sum of the shares that make(i, worker's scratch) gives for i in [0, count), in their order.
template <class Make>
void sum_shares(int64_t count, int64_t size, void* out, Dtype dtype, int64_t scratch_bytes, Make&& make) {
  std::vector<Tensor> shares(count);
  for_tasks(count, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    for (int64_t i = begin; i < end; ++i) shares[i] = make(i, scratch);
  });
  round_sum(count, size, out, dtype, [&](int64_t i, int64_t first, int64_t n, float* wide) {
    kernels(dtype).widen(at(shares[i].const_data_ptr(), first, dtype), wide, n, dtype);
    return wide;
  });
}

// Parts of the pixels: of NHWC images any, of NCHW images whole ones.
void by_pixels(const Tensor& dz, const Tensor& hidden, bool nhwc, void* out, Dtype dtype) {
  const Tensor left = nhwc ? as_one_row(dz) : dz, right = nhwc ? as_one_row(hidden) : hidden;
  const int64_t c = hidden.size(1), c_out = dz.size(1), dim = nhwc ? 3 : 0, all = left.size(dim);
  const int64_t parts = std::min(all, parts_for(pixels_of(dz), c, c_out));
  sum_shares(parts, c_out * c, out, dtype, 0, [&](int64_t i, const Scratch&) {
    const int64_t first = all * i / parts, count = all * (i + 1) / parts - first;
    const Tensor dz_part = narrow(left, dim, first, count), hidden_part = narrow(right, dim, first, count);
    return nhwc ? share_of_pixels(dz_part, hidden_part) : share_of(dz_part, hidden_part);
  });
}

// Large filters of few pixels: shared out by output channels, as writing another share would take longer than reading
// the depthwise output again.
void by_channels(const Tensor& dz, const Tensor& hidden, bool nhwc, void* out, Dtype dtype) {
  const Tensor left = nhwc ? as_one_row(dz) : dz, right = nhwc ? as_one_row(hidden) : hidden;
  const int64_t c_out = dz.size(1), c = hidden.size(1);
  const int64_t part = std::max<int64_t>(64, ceil_div(ceil_div(c_out, kTasks), 16) * 16);
  for_tasks(ceil_div(c_out, part), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * part, count = std::min(part, c_out - first);
      const Tensor share = share_of(narrow(left, 1, first, count), right);
      std::memcpy(at(out, first * c, dtype), share.const_data_ptr(), count * c * size_of(dtype));
    }
  });
}

// NHWC images in 16 bits: one matrix product over all pixels, whose factors need no copy, in tiles. They are of one
// size, a power of 2 of them, and as square as that allows, since each reads its rows and its columns of the factors
// (512 to 512 channels, 14 px, bf16, eight tasks on one thread: 21 ms by rows alone, 18.7 by tiles of 128 x 256).
void by_tiles(const Tensor& dz, const Tensor& hidden, void* out, Dtype dtype) {
  const int64_t pixels = pixels_of(dz), c = hidden.size(1), c_out = dz.size(1);
  int64_t rows = c_out, columns = c;
  for (int64_t tasks = tasks_for(2 * pixels * c * c_out, dtype); tasks > 1; tasks /= 2) {
    int64_t& longer = rows >= columns ? rows : columns;
    longer = (longer + 1) / 2;
  }
  const int64_t across = ceil_div(c, columns), down = ceil_div(c_out, rows);
  for_tasks(across * down, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across * rows, column = i % across * columns;
      const int64_t high = std::min(rows, c_out - row), wide = std::min(columns, c - column);
      const Matrix left{at(const_cast<void*>(dz.const_data_ptr()), row, dtype), dtype, high, pixels, 1, c_out};
      const Matrix right{at(const_cast<void*>(hidden.const_data_ptr()), column, dtype), dtype, pixels, wide, c, 1};
      Product(left, right, {at(out, row * c + column, dtype), dtype, high, wide, c, 1});
    }
  });
}

}  // namespace

void filter_gradient(const Tensor& dz, const Tensor& hidden, bool nhwc, void* out) {
  const Dtype dtype = dtype_of(dz, "dz");
  const int64_t c = hidden.size(1), c_out = dz.size(1);
  if (factor_type(dtype) != dtype) {
    const Scratch wide(c_out * c * sizeof(float));
    filter_gradient(torch::stable::to(dz, ScalarType::Float), torch::stable::to(hidden, ScalarType::Float), nhwc,
                    wide.as());
    kernels(dtype).finish({wide.as(), nullptr, out, c_out, c, c, c}, Activation::none, Dtype::f32, dtype);
    return;
  }
  switch (plan_filter_gradient(dtype, nhwc, pixels_of(dz), c, c_out)) {
    case FilterGradient::tiles:
      return by_tiles(dz, hidden, out, dtype);
    case FilterGradient::channels:
      return by_channels(dz, hidden, nhwc, out, dtype);
    default:
      return by_pixels(dz, hidden, nhwc, out, dtype);
  }
}

void filter_gradient_by_bands(const Separable& s, const Tensor& dz, void* out) {
  const int64_t c = s.g.channels, all = pixels_of(dz);
  const Bands bands(s, std::max<int64_t>(1, all / parts_for(all, c, s.c_out)));
  const PackedFilter depthwise = kernels(s.dtype).pack_filter(s.g, s.depthwise, s.depthwise_bias, s.dtype);
  const Tensor row = as_one_row(dz);
  const int64_t bytes = bands.most_pixels() * c * size_of(s.dtype);
  sum_shares(bands.count(), s.c_out * c, out, s.dtype, bytes, [&](int64_t i, const Scratch& scratch) {
    const Band band = bands[i];
    depthwise_band(s, band, depthwise, Activation::none, scratch.as());
    const Ints size{1, c, 1, band.pixels}, strides{band.pixels * c, 1, band.pixels * c, c};
    const Tensor hidden = torch::stable::from_blob(scratch.as(), IntList(size.data(), 4), IntList(strides.data(), 4),
                                                   dz.device(), dz.scalar_type());
    return share_of_pixels(narrow(row, 3, band.first_pixel, band.pixels), hidden);
  });
}

}  // namespace rkl::cpu
