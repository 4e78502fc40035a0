// The gradients of a pointwise step's filter and bias: sums over all pixels, in parts.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/separable/pointwise.h"
#include "cpu/separable/task_sums.h"
#include "cpu/simd/scratch.h"

namespace rkl::cpu {
namespace {

using Ints = std::vector<int64_t>;
using torch::stable::narrow;

int64_t pixels_of(const Tensor& image) { return image.size(0) * image.size(2) * image.size(3); }

// All pixels of an NHWC image as one row of an image: a view.
Tensor as_one_row(const Tensor& image) { return image_of_rows(pixel_rows(image), 1, 1, pixels_of(image)); }

// oneDNN's filter gradient over these images, on the calling thread: (C', C, 1, 1) in the images' type. In 16 bits each
// share is rounded: for sums of random signs, that costs no more than rounding the factors has already cost.
Tensor share_of(const Tensor& dz, const Tensor& hidden) {
  using torch::stable::detail::from, torch::stable::detail::to;
  const Ints size{dz.size(1), hidden.size(1), 1, 1}, ones{1, 1}, zeros{0, 0};
  // A dilation of 2 does not change a 1 x 1 filter. It keeps torch off another library's kernel, which takes twice as
  // long and which torch would choose by the number of threads.
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

// How many parts the pixels are cut into, a call of oneDNN's each. A call costs 40 us, and its share as much as some
// 100 pixels. A power of 2 gives as many threads equal parts.
int64_t parts_for(int64_t pixels, int64_t c, int64_t c_out) {
  const int64_t most = std::min({2 * kTasks, 2 * pixels * c * c_out / 50000000, pixels / 1024});
  int64_t parts = 2;
  while (2 * parts <= most) parts *= 2;
  return parts;
}

// By oneDNN: each task takes some pixels.
void by_pixels(const Tensor& dz, const Tensor& hidden, void* out, Dtype dtype) {
  Tensor left = as_one_row(dz), right = as_one_row(hidden);
  const int64_t c = hidden.size(1), c_out = dz.size(1), all = pixels_of(dz);
  const int64_t parts = std::min(all, parts_for(all, c, c_out)), size = c_out * c;
  const Scratch shares(parts * size * int64_t(sizeof(float)));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const OneThread here;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = all * i / parts, count = all * (i + 1) / parts - first;
      const Tensor share = share_of(narrow(left, 3, first, count), narrow(right, 3, first, count));
      kernels(dtype).widen(share.const_data_ptr(), shares.as<float>() + i * size, size);
    }
  });
  round_shares(shares.as<float>(), parts, c_out, c, {size, c, PointwiseFilter::kOutputs}, out, dtype);
}

// By oneDNN, for large filters of few pixels: each task makes some output channels. To write another share would take
// longer than to read the depthwise output again.
void by_channels(const Tensor& dz, const Tensor& hidden, void* out, Dtype dtype) {
  Tensor left = as_one_row(dz), right = as_one_row(hidden);
  const int64_t c_out = dz.size(1), c = hidden.size(1);
  const int64_t part = std::max<int64_t>(64, ceil_div(ceil_div(c_out, kTasks), 16) * 16);
  torch::stable::parallel_for(0, ceil_div(c_out, part), 1, [&](int64_t begin, int64_t end) {
    const OneThread here;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * part, count = std::min(part, c_out - first);
      const Tensor share = share_of(narrow(left, 1, first, count), right);
      std::memcpy(at(out, first * c, dtype), share.const_data_ptr(), count * c * size_of(dtype));
    }
  });
}

// By the kernels here.
void by_tasks(const Tensor& dz, const Tensor& hidden, void* out, Dtype dtype) {
  const int64_t c = hidden.size(1), c_out = dz.size(1), all = pixels_of(dz);
  const Shares shares = plan_shares(all, c, c_out);
  const FilterSums sums(shares, c, c_out, dtype);
  torch::stable::parallel_for(0, sums.tasks(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = sums.scratch();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = sums.pixels(task), first = all * i / shares.pixels, last = all * (i + 1) / shares.pixels;
      sums.add(task, true, at(dz.const_data_ptr(), first * c_out, dtype), at(hidden.const_data_ptr(), first * c, dtype),
               last - first, scratch);
    }
  });
  sums.round_into(out);
}

}  // namespace

void filter_gradient(const Tensor& dz, const Tensor& hidden, FilterGradient how, void* out) {
  const Dtype dtype = dtype_of(dz, "dz");
  const auto by = how == FilterGradient::tasks ? by_tasks : how == FilterGradient::channels ? by_channels : by_pixels;
  by(dz, hidden, out, dtype);
}

void channel_sums(const void* image, void* out, int64_t pixels, int64_t channels, Dtype dtype) {
  // A part is as many pixels as lie in a core's own cache.
  const int64_t part = std::max<int64_t>(64, (int64_t(1) << 16) / channels);
  const int64_t parts = ceil_div(pixels, part), tasks = std::min<int64_t>(parts, 2 * kTasks);
  std::vector<double> sums(tasks * channels);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      for (int64_t i = parts * task / tasks; i < parts * (task + 1) / tasks; ++i)
        kernels(dtype).add_column_sums(at(image, i * part * channels, dtype), sums.data() + task * channels,
                                       std::min(part, pixels - i * part), channels);
  });
  round_bias(sums, channels, out, dtype);
}

}  // namespace rkl::cpu
