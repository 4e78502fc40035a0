// Gradients of filter and bias by the row pipeline (rows.cuh), and both gradients in one pass at 3 x 3.
//
// The filter's gradient is a matrix product, too. The left operand is the inputs of two taps by 8 channels, over 16
// pixels; the right one is the output's gradient of these pixels by 8 channels. Only the diagonals of its two 8 x 8
// blocks are wanted. ldmatrix transposes the inputs, which lie as pixels by channels; a tap reads from a shifted
// address. A block makes every parts-th task and keeps its sums in registers throughout.
#include "cuda/rows_launch.cuh"

namespace rkl::cuda {
namespace rows {

// The addresses from which lanes load transposed left operands in a row of inputs: 16 pixels for two columns of the
// filter. Columns count from the window's left, or with `reverse` from its right. last: for a column without a pair.
template <int kernel_w, int stride, bool reverse>
struct TransposedOperands {
  uint32_t pair[2], last[2];
  int step;

  __device__ void init(const Tiling& t, const Strip& s) {
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
    const auto at = [&](int o, int column) {
      if (column >= kernel_w) column = kernel_w - 1;
      const int shift = reverse ? kernel_w - 1 - column : column;
      const int pixel = s.pixel(o) + lane % 8 * stride + shift * t.dilation_w;
      return uint32_t((place<stride>(pixel, t.width / 2) * t.pitch + group) * 16);
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      pair[i] = at(2 * i + lane / 16, lane / 8 % 2);
      last[i] = at(2 * i + lane / 16, kernel_w - 1);
    }
    step = (reverse ? -2 : 2) / stride * t.dilation_w * t.pitch * 16;
  }
};

// The sums of a group's taps, tap[kh][q] for columns 2 q and 2 q + 1 of row kh of the filter, and the bias's sums.
template <class T, int kernel_h, int kernel_w>
struct TapSums {
  static constexpr int kPairs = (kernel_w + 1) / 2;
  float tap[kernel_h][kPairs][4], bias[4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kernel_h * kPairs * 4; ++i) tap[i / (kPairs * 4)][i / 4 % kPairs][i % 4] = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) bias[i] = 0.f;
  }
  // Writes the diagonals: lane 4 n + n / 2 has channel n.
  __device__ void write(const FilterGrad& a, const Tiling& t, int part, int channel) const {
    const int lane = threadIdx.x % 32, n = lane / 4, c = channel + n, odd = n % 2;
    if (lane % 4 != n / 2 || c >= t.channels) return;
#pragma unroll
    for (int kh = 0; kh < kernel_h; ++kh)
#pragma unroll
      for (int kw = 0; kw < kernel_w; ++kw)
        if (kh < t.kernel_h && kw < t.kernel_w) {
          const float (&pair)[4] = tap[kh][kw / 2];
          a.sum(part, kh * t.kernel_w + kw, c) = odd ? pair[kw % 2 * 2 + 1] : pair[kw % 2 * 2];
        }
    if (a.with_bias) a.sum(part, t.kernel_h * t.kernel_w, c) = odd ? bias[1] : bias[0];
  }
};

template <class T>
__device__ inline uint32_t two_ones() {
  return pack2<T>(1.f, 1.f);
}

// Loads a row's 32 pixels as right operands, behind the older rows in flight. It is a row of the gradient, or of the
// image where both gradients are made.
template <int flight>
__device__ inline void take_row(uint32_t address, uint32_t (&rows)[flight][4]) {
#pragma unroll
  for (int i = 0; i < 4 * (flight - 1); ++i) rows[i / 4][i % 4] = rows[i / 4 + 1][i % 4];
  ldmatrix_x4<true>(rows[flight - 1], address);
}

template <class T, int k>
__global__ void __launch_bounds__(kFilterGrads[k].threads(), kFilterGrads[k].blocks())
    rows_filter_grad(Tiling t, FilterGrad a, const T* images, const T* gradients, int first_part, int parts,
                     int tasks) {
  constexpr int kernel_h = kFilterGrads[k].kernel_h, kernel_w = kFilterGrads[k].kernel_w;
  constexpr int stride = kFilterGrads[k].stride, flight = in_flight(kernel_h, stride), pairs = (kernel_w + 1) / 2;
  constexpr int kRing = kFilterGrads[k].ring(), kAhead = kFilterGrads[k].ahead();
  extern __shared__ __align__(128) unsigned char memory[];
  const int channel_block = blockIdx.x % t.channel_blocks, part = blockIdx.x / t.channel_blocks;
  const int channel = (channel_block * t.groups + threadIdx.x / 32) * 8;
  const Lane lane(t, channel_block);
  const uint32_t row_bytes = t.width * t.pitch * 16, column_bytes = kStrip * t.pitch * 16;
  const uint32_t ring = opaque(shared_address(memory)), grads = ring + kRing * row_bytes;
  const uint32_t take_at = opaque(grads + (threadIdx.x % 32 * t.pitch + threadIdx.x / 32) * 16);
  TapSums<T, kernel_h, kernel_w> sums;
  sums.clear();

  Task task;
  RowLoader<T, kFilterGrads[k].slots> inputs;
  RowLoader<T, 1> columns;
  TransposedOperands<kernel_w, stride, false> operands;
  for (int number = part; number < tasks; number += parts) {
    if (task.move_to(t, number)) {
      inputs.template init_inputs<stride>(t, task, lane);
      columns.init_columns(t, task, lane);
      operands.init(t, task.strip);
    }
    if (task.rows <= 0) continue;
    const uint32_t in_group = task.group * (t.group_images * t.in_h * t.in_w * t.channels);
    const uint32_t out_group = task.group * (t.group_images * t.out_h * t.out_w * t.channels);
    __syncthreads();  // the rows of the task before have been read
    const int first = task.row * stride - t.padding_h;
    const unsigned end = max(0, min(t.in_h, first + ((task.rows - 1) * stride + kernel_h - 1) * t.dilation_h + 1));
    const auto load_input = [&](int s) {
      const int row = first + s * t.dilation_h;
      const bool inside = unsigned(row) < end;
      inputs.load(ring + s % kRing * row_bytes, images, in_group + row * (t.in_w * t.channels), inside);
      cp_async_commit();
    };
    const auto load_grad = [&](int s) {
      const bool inside = s < task.rows;
      const int row = task.row + s * t.dilation_h;
      columns.load(grads + s % kRing * column_bytes, gradients, out_group + row * (t.out_w * t.channels), inside);
    };
    // A row of the gradient is copied in one cp.async group with the last of its `stride` rows of inputs.
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (s % stride == stride - 1) load_grad(s / stride);
      load_input(s);
    }
    uint32_t newest[flight][4];
#pragma unroll
    for (int i = 0; i < flight * 4; ++i) newest[i / 4][i % 4] = 0;

    const Inside<stride> inside(first, t.dilation_h, t.in_h);
    for (int s = 0; s < task.rows + flight - 1; ++s) {
      cp_async_wait<kAhead - stride>();
      __syncthreads();  // this step's rows have arrived for all threads; the slots of earlier rows are free
#pragma unroll
      for (int i = 0; i < stride; ++i) {
        if (i == stride - 1) load_grad(s + kAhead / stride);
        load_input(s * stride + kAhead + i);
      }
      take_row(take_at + s % kRing * column_bytes, newest);
      if (a.with_bias)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t ones[4] = {two_ones<T>(), two_ones<T>(), two_ones<T>(), two_ones<T>()};
          mma_m16n8k16<T>(sums.bias, ones, newest[flight - 1][2 * i], newest[flight - 1][2 * i + 1], sums.bias);
        }
      if (!inside.has(s)) continue;
#pragma unroll
      for (int phase = 0; phase < stride; ++phase) {
        const uint32_t row = ring + (s * stride + phase) % kRing * row_bytes;
#pragma unroll
        for (int q = 0; q < pairs; ++q)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            uint32_t in[4];
            ldmatrix_x4<true>(in,
                              row + (2 * q + 1 < kernel_w ? operands.pair[i] + q * operands.step : operands.last[i]));
#pragma unroll
            for (int j = 0; j < flight; ++j) {
              const int kh = (flight - 1 - j) * stride + phase;
              if (kh >= kernel_h) continue;
              float (&sum)[4] = sums.tap[kh < kernel_h ? kh : 0][q];
              mma_m16n8k16<T>(sum, in, newest[j][2 * i], newest[j][2 * i + 1], sum);
            }
          }
      }
    }
    cp_async_wait<0>();
  }
  sums.write(a, t, first_part + part, channel);
}

// t tiles the data gradient as a convolution: its inputs are the output's gradient, its outputs dx.
template <class T, int k>
__global__ void __launch_bounds__(kBothGrads[k].threads(), kBothGrads[k].blocks())
    rows_both_grads(Tiling t, FilterGrad a, const T* images, const T* gradients, const T* weight, T* image_gradients,
                    int first_part, int parts, int tasks) {
  constexpr int kernel_h = kBothGrads[k].kernel_h, kernel_w = kBothGrads[k].kernel_w, pairs = (kernel_w + 1) / 2;
  constexpr int kRing = kBothGrads[k].ring(), kAhead = kBothGrads[k].ahead();
  extern __shared__ __align__(128) unsigned char memory[];
  const int channel_block = blockIdx.x % t.channel_blocks, part = blockIdx.x / t.channel_blocks;
  const int channel = (channel_block * t.groups + threadIdx.x / 32) * 8;
  const Lane lane(t, channel_block);
  const uint32_t row_bytes = t.width * t.pitch * 16, column_bytes = kStrip * t.pitch * 16;
  const uint32_t ring = opaque(shared_address(memory)), image_ring = ring + kRing * row_bytes;
  const uint32_t buffers = image_ring + kRing * column_bytes, at = (threadIdx.x % 32 * t.pitch + threadIdx.x / 32) * 16;
  const uint32_t take_at = opaque(image_ring + at), put_at = opaque(buffers + at);
  const float zeros[4] = {};
  Taps<T, kernel_h, kernel_w> taps;
  taps.load(t, weight, channel, true);
  TapSums<T, kernel_h, kernel_w> tap_sums;
  tap_sums.clear();

  Task task;
  RowLoader<T, kBothGrads[k].slots> grads;
  RowLoader<T, 1> columns;
  RowWriter<T> writer;
  Operands<kernel_w, 1> operands;
  TransposedOperands<kernel_w, 1, true> transposed;
  for (int number = part; number < tasks; number += parts) {
    if (task.move_to(t, number)) {
      grads.template init_inputs<1>(t, task, lane);
      columns.init_columns(t, task, lane);
      writer.init(t, task, lane);
      operands.init(t, task.strip);
      transposed.init(t, task.strip);
    }
    if (task.rows <= 0) continue;
    const uint32_t in_group = task.group * (t.group_images * t.in_h * t.in_w * t.channels);
    const uint32_t out_group = task.group * (t.group_images * t.out_h * t.out_w * t.channels);
    writer.to = writer.begin + out_group;
    const int first = task.row - t.padding_h, steps = task.rows + kernel_h - 1;
    const Inside<1> inside(first, t.dilation_h, t.in_h);
    const unsigned end = max(0, min(t.in_h, first + (steps - 1) * t.dilation_h + 1));
    const auto load = [&](int s) {
      const int row = first + s * t.dilation_h;
      const bool in_gradient = unsigned(row) < end, in_image = s < task.rows;
      grads.load(ring + s % kRing * row_bytes, gradients, in_group + row * (t.in_w * t.channels), in_gradient);
      columns.load(image_ring + s % kRing * column_bytes, images,
                   out_group + (task.row + s * t.dilation_h) * (t.out_w * t.channels), in_image);
      cp_async_commit();
    };
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(s);
    Sums sums[kernel_h];
#pragma unroll
    for (int i = 0; i < kernel_h * 8; ++i) sums[i / 8][i / 4 % 2][i % 4] = 0.f;
    uint32_t image[kernel_h][4];
#pragma unroll
    for (int i = 0; i < kernel_h * 4; ++i) image[i / 4][i % 4] = 0;

    const auto store = [&](int s) {
      if (s >= kernel_h) writer.write(image_gradients, buffers + (s - 1 & 1) * column_bytes);
    };
    const auto finish = [&](int s) {
      if (s >= kernel_h - 1) put_row<T>(put_at + (s & 1) * column_bytes, sums[0]);
    };
    int s = 0;
    for (; s < min(inside.end, steps); ++s) {
      cp_async_wait<kAhead - 1>();
      __syncthreads();
      load(s + kAhead);
      store(s);
      const uint32_t row = ring + s % kRing * row_bytes;
      add_row<T, kernel_h, kernel_w, 1, 0>(row, operands, taps, zeros, sums);
      // Row s of the gradient meets row kh of the filter at the image's row s - (kernel_h - 1) + kh.
      take_row(take_at + s % kRing * column_bytes, image);
#pragma unroll
      for (int q = 0; q < pairs; ++q)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t in[4];
          ldmatrix_x4<true>(
              in, row + (2 * q + 1 < kernel_w ? transposed.pair[i] + q * transposed.step : transposed.last[i]));
#pragma unroll
          for (int kh = 0; kh < kernel_h; ++kh)
            mma_m16n8k16<T>(tap_sums.tap[kh][q], in, image[kh][2 * i], image[kh][2 * i + 1], tap_sums.tap[kh][q]);
          // The bias's gradient sums what meets the filter's middle tap, as each element of the gradient does once.
          // That tap is in the second column of pair 0.
          if (q == 0 && a.with_bias && s >= 1 && s <= task.rows)
            mma_m16n8k16<T>(tap_sums.bias, in, two_ones<T>(), two_ones<T>(), tap_sums.bias);
        }
      finish(s);
    }
    for (; s < steps; ++s) {
      __syncthreads();
      store(s);
      add_nothing(zeros, sums);
      finish(s);
    }
    __syncthreads();  // also, all rows of both rings have been read: the next task may copy into them
    writer.write(image_gradients, buffers + (steps - 1 & 1) * column_bytes);
    cp_async_wait<0>();
  }
  // The middle's sums are in the lower half of the fragment.
  tap_sums.bias[0] = tap_sums.bias[2];
  tap_sums.bias[1] = tap_sums.bias[3];
  tap_sums.write(a, t, first_part + part, channel);
}

// Calls launch with each launch's tiling, first image and first part.
template <class F>
void by_parts(const Conv2d& g, const Conv2d& tiled, const Kernel& kernel, const Plan& plan, F&& launch) {
  const int64_t launches = ceil_div(g.batch, images_at_once(g));
  int part = 0;
  by_images(g, [&](int64_t first, int images) {
    launch(tiling(tiled, kernel, images, plan.rows), first, part, plan.parts / int(launches));
    part += plan.parts / int(launches);
  });
}

}  // namespace rows

void launch_rows_filter_grad(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  using namespace rows;
  const Conv2d& g = a.g;
  by_kernel<sizeof(kFilterGrads) / sizeof(Kernel)>(plan.kernel, dtype, [&](auto k, auto zero) {
    using T = decltype(zero);
    constexpr int number = decltype(k)::value;
    allow_shared(reinterpret_cast<const void*>(&rows_filter_grad<T, number>), plan.shared);
    by_parts(g, g, kFilterGrads[number], plan, [&](const Tiling& t, int64_t first, int first_part, int parts) {
      rows_filter_grad<T, number>
          <<<grid("rows_filter_grad", t.channel_blocks * parts), dim3(32 * t.groups), plan.shared, stream>>>(
              t, a, image(static_cast<const T*>(a.x), first, g.in_h * g.in_w * g.channels),
              image(static_cast<const T*>(a.grad), first, g.out_h * g.out_w * g.channels), first_part, parts,
              int(t.tasks()));
    });
  });
  check_launch("rows_filter_grad");
}

void launch_rows_both_grads(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  using namespace rows;
  const Conv2d& g = a.g;
  by_kernel<sizeof(kBothGrads) / sizeof(Kernel)>(plan.kernel, dtype, [&](auto k, auto zero) {
    using T = decltype(zero);
    constexpr int number = decltype(k)::value;
    allow_shared(reinterpret_cast<const void*>(&rows_both_grads<T, number>), plan.shared);
    by_parts(g, data_grad_as_convolution(g), kBothGrads[number], plan,
             [&](const Tiling& t, int64_t first, int first_part, int parts) {
               const int64_t in = g.in_h * g.in_w * g.channels;
               rows_both_grads<T, number>
                   <<<grid("rows_both_grads", t.channel_blocks * parts), dim3(32 * t.groups), plan.shared, stream>>>(
                       t, a, image(static_cast<const T*>(a.x), first, in),
                       image(static_cast<const T*>(a.grad), first, g.out_h * g.out_w * g.channels),
                       static_cast<const T*>(a.weight), image(static_cast<T*>(a.dx), first, in), first_part, parts,
                       int(t.tasks()));
             });
  });
  check_launch("rows_both_grads");
}

}  // namespace rkl::cuda
