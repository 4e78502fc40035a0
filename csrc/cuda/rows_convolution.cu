// Depthwise convolution, and its data gradient at stride 1, by the row pipeline (rows.cuh).
#include "cuda/activation.cuh"
#include "cuda/kernels.h"
#include "cuda/rows_launch.cuh"

namespace rkl::cuda {
namespace rows {

// activated: whether there is an activation. The others have kernels without the switch, which costs time in each row.
template <class T, int k, bool activated>
__global__ void __launch_bounds__(kConvolutions[k].threads(), kConvolutions[k].blocks())
    rows_convolution(Tiling t, const T* images, const T* weight, const T* bias, T* outputs, Activation act,
                     bool flipped, int tasks) {
  constexpr int kernel_h = kConvolutions[k].kernel_h, kernel_w = kConvolutions[k].kernel_w;
  constexpr int stride = kConvolutions[k].stride, flight = in_flight(kernel_h, stride);
  constexpr int kRing = kConvolutions[k].ring(), kAhead = kConvolutions[k].ahead();
  extern __shared__ __align__(128) unsigned char memory[];
  const int channel_block = blockIdx.x % t.channel_blocks, first_task = blockIdx.x / t.channel_blocks;
  const int step = gridDim.x / t.channel_blocks, channel = (channel_block * t.groups + threadIdx.x / 32) * 8;
  const Lane lane(t, channel_block);
  const uint32_t row_bytes = t.width * t.pitch * 16, column_bytes = kStrip * t.pitch * 16;
  const uint32_t ring = opaque(shared_address(memory)), buffers = ring + kRing * row_bytes;
  const uint32_t put_at = opaque(buffers + (threadIdx.x % 32 * t.pitch + threadIdx.x / 32) * 16);
  Taps<T, kernel_h, kernel_w> taps;
  taps.load(t, weight, channel, flipped);
  float begin[4] = {};
  const int c = channel + threadIdx.x % 4 * 2;
  if (bias && c < t.channels)
#pragma unroll
    for (int i = 0; i < 4; ++i) begin[i] = to_float(bias[c + i % 2]);

  Task task;
  RowLoader<T, kConvolutions[k].slots> inputs;
  Operands<kernel_w, stride> operands;
  RowWriter<T> writer;
  for (int number = first_task; number < tasks; number += step) {
    if (task.move_to(t, number)) {
      inputs.template init_inputs<stride>(t, task, lane);
      operands.init(t, task.strip);
      writer.init(t, task, lane);
    }
    if (task.rows <= 0) continue;  // the last chunk of a residue may be empty
    const uint32_t group = task.group * (t.group_images * t.in_h * t.in_w * t.channels);
    writer.to = writer.begin + task.group * (t.group_images * t.out_h * t.out_w * t.channels);
    const int first = task.row * stride - t.padding_h;
    const unsigned end = max(0, min(t.in_h, first + ((task.rows - 1) * stride + kernel_h - 1) * t.dilation_h + 1));
    const auto load = [&](int s) {  // copies the task's input row s; rows past its end are not read
      const int row = first + s * t.dilation_h;
      const bool inside = unsigned(row) < end;
      inputs.load(ring + s % kRing * row_bytes, images, group + row * (t.in_w * t.channels), inside);
      cp_async_commit();
    };
    const Inside<stride> inside(first, t.dilation_h, t.in_h);
    const int steps = task.rows + flight - 1, first_step = min(inside.begin, flight - 1);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(first_step * stride + s);
    Sums sums[flight];
    begin_all(begin, sums);

    const auto store = [&](int s) {  // writes the row that step s - 1 has finished
      if (s >= flight) writer.write(outputs, buffers + (s - 1 & 1) * column_bytes);
    };
    const auto finish = [&](int s) {
      if (s < flight - 1) return;
      if constexpr (activated) activate_all<T, true>(act, flat(sums[0]));
      put_row<T>(put_at + (s & 1) * column_bytes, sums[0]);
    };
    int s = first_step;
    for (; s < min(inside.end, steps); ++s) {
      cp_async_wait<kAhead - stride>();
      // This step's rows have arrived for all threads. All warps are done with the step before, so the ring's slots of
      // earlier rows are free, and so is the buffer that the step before copied to the image.
      __syncthreads();
#pragma unroll
      for (int i = 0; i < stride; ++i) load(s * stride + kAhead + i);
      store(s);
      add_row<T, kernel_h, kernel_w, stride, 0>(ring + s * stride % kRing * row_bytes, operands, taps, begin, sums);
      if constexpr (stride == 2)
        add_row<T, kernel_h, kernel_w, 2, 1>(ring + (s * 2 + 1) % kRing * row_bytes, operands, taps, begin, sums);
      finish(s);
    }
    for (; s < steps; ++s) {
      __syncthreads();
      store(s);
      add_nothing(begin, sums);
      finish(s);
    }
    __syncthreads();  // also, all rows of the ring have been read: the next task may copy into it
    writer.write(outputs, buffers + (steps - 1 & 1) * column_bytes);
    cp_async_wait<0>();
  }
}

}  // namespace rows

void launch_rows_convolution(const Convolution& a, bool flipped, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  using namespace rows;
  const Conv2d& g = a.g;
  const bool here = is_short(a.act);  // else the activation is a pass of its own
  by_kernel<sizeof(kConvolutions) / sizeof(Kernel)>(plan.kernel, dtype, [&](auto k, auto zero) {
    by_flag(here && a.act != Activation::none, [&](auto activated) {
      using T = decltype(zero);
      constexpr int number = decltype(k)::value;
      constexpr bool with = decltype(activated)::value;
      allow_shared(reinterpret_cast<const void*>(&rows_convolution<T, number, with>), plan.shared);
      by_images(g, [&](int64_t first, int images) {
        const Tiling t = tiling(g, kConvolutions[number], images, plan.rows);
        rows_convolution<T, number, with>
            <<<grid("rows_convolution", t.blocks(plan.parts)), dim3(32 * t.groups), plan.shared, stream>>>(
                t, image(static_cast<const T*>(a.x), first, g.in_h * g.in_w * g.channels),
                static_cast<const T*>(a.weight), static_cast<const T*>(a.bias),
                image(static_cast<T*>(a.y), first, g.out_h * g.out_w * g.channels), a.act, flipped, int(t.tasks()));
      });
    });
  });
  check_launch("rows_convolution");
  if (!here) epilogue(a.y, nullptr, a.act, a.y, g.batch * g.out_h * g.out_w, g.channels, dtype, stream);
}

}  // namespace rkl::cuda
