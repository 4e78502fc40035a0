// The data gradient at stride 2 by the row pipeline (rows.cuh).
//
// Rows and columns of dx, counted with the padding, are made in pairs. The even row of a pair meets the filter's even
// rows, the odd row its odd rows, and both meet the same rows of the gradient; columns likewise. So dx is a stride-1
// convolution of the gradient with a filter of half the size (stride2_data_grad_as_pairs in plan.h), which has four
// outputs at each place: even and odd rows by even and odd columns.
#include "cuda/rows_launch.cuh"

namespace rkl::cuda {
namespace rows {

// dx's size, and how many rows and columns of the first pair lie outside of it.
struct Image {
  int height, width, top, left;
};

// A group's filter as right operands, like Taps, for outputs in even and in odd columns. Each has all rows of the
// filter and half of its columns, in the order in which the window's columns meet them from the left.
template <class T, int kernel>
struct ParityTaps {
  static constexpr int kHalf = (kernel + 1) / 2;
  uint32_t pair[2][kernel][kHalf / 2 + 1][2];  // [odd column]; with an odd half, [1] of the last column is not used

  __device__ void load(const Tiling& t, const T* weight, int channel) {
    const int lane = threadIdx.x % 32, n = lane / 4, k = lane % 4 * 2, c = channel + n;
    const uint16_t* filter = reinterpret_cast<const uint16_t*>(weight) + c * t.kernel_h * t.kernel_w;
#pragma unroll
    for (int odd = 0; odd < 2; ++odd)
#pragma unroll
      for (int kh = 0; kh < kernel; ++kh)
#pragma unroll
        for (int j = 0; j < kHalf; ++j) {
          const int kw = odd + 2 * (kHalf - 1 - j);
          uint32_t value = 0;
          if (c < t.channels && kh < t.kernel_h && kw < t.kernel_w && (n == k || n == k + 1))
            value = filter[kh * t.kernel_w + kw];
          pair[odd][kh][j / 2][j % 2] = n == k ? value : value << 16;
        }
  }
};

// Adds one row of the gradient to the pairs of rows in flight: sums[odd row][j][odd column]. The even row of pair j
// meets row 2 j of the filter, the odd row 2 j + 1. The oldest pair is j = 0.
template <class T, int kernel>
__device__ inline void add_gradient_row(uint32_t row, const Operands<(kernel + 1) / 2, 1>& at,
                                        const ParityTaps<T, kernel>& taps, Sums (&sums)[2][(kernel + 1) / 2][2]) {
  constexpr int half = (kernel + 1) / 2, pairs = half / 2;
  const float zeros[4] = {};
#pragma unroll
  for (int q = 0; q < (half + 1) / 2; ++q) {
    uint32_t a[2][4];
    if (q < pairs) {
      ldmatrix_x4(a[0], row + at.pair[0] + q * at.step);
      ldmatrix_x4(a[1], row + at.pair[1] + q * at.step);
    } else {
      ldmatrix_x4(a[0], row + at.last);
    }
#pragma unroll
    for (int parity = 0; parity < 2; ++parity)
#pragma unroll
      for (int j = 0; j < half; ++j) {
        const int kh = 2 * j + parity;
        if (kh >= kernel) continue;
        const bool newest = 2 * (j + 1) + parity >= kernel;
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float (&to)[4] = sums[parity][j][odd][i];
            const float* older = q > 0 ? to : newest ? zeros : sums[parity][j + 1 < half ? j + 1 : j][odd][i];
            const float (&from)[4] = *reinterpret_cast<const float (*)[4]>(older);
            const uint32_t* b = taps.pair[odd][kh < kernel ? kh : 0][q];
            if (q < pairs)
              mma_m16n8k16<T>(to, a[i], b[0], b[1], from);
            else
              mma_m16n8k8<T>(to, a[0][2 * i], a[0][2 * i + 1], b[0], from);
          }
      }
  }
}

// A row of padding: the window moves on.
template <int half>
__device__ inline void add_nothing(Sums (&sums)[2][half][2]) {
#pragma unroll
  for (int parity = 0; parity < 2; ++parity)
#pragma unroll
    for (int j = 0; j < half; ++j)
#pragma unroll
      for (int e = 0; e < 16; ++e)
        sums[parity][j][e / 8][e / 4 % 2][e % 4] =
            j + 1 < half ? sums[parity][j + 1 < half ? j + 1 : 0][e / 8][e / 4 % 2][e % 4] : 0.f;
}

// Writes a thread's pieces of each pair of rows of dx: both columns of its pair, in both rows.
template <class T>
struct PairWriter {
  uint32_t begin, to,
      from;        // elements: of the first even row in its group of images, of the next in all; byte in the buffer
  int row;         // the even row of the next pair, in dx
  bool writes[2];  // whether dx has each column of the pair

  __device__ void init(const Tiling& t, const Task& task, const Lane& lane, const Image& dx) {
    const int o = lane.pixel / kOctet, image = task.strip.image_of(o);
    const int pair = task.strip.column(o) + lane.pixel % kOctet, column = 2 * pair - dx.left;
    const bool inside = image < task.images && pair < t.out_w && lane.channel < t.channels;
    writes[0] = inside && column >= 0 && column < dx.width;
    writes[1] = inside && column + 1 >= 0 && column + 1 < dx.width;
    begin = ((image * dx.height + 2 * task.row - dx.top) * dx.width + column) * t.channels + lane.channel;
    from = (lane.pixel * t.pitch + lane.group) * 16;
  }
  __device__ void write(const Tiling& t, const Image& dx, T* image, uint32_t buffer, uint32_t column_bytes) {
    const int row_pitch = dx.width * t.channels;
#pragma unroll
    for (int parity = 0; parity < 2; ++parity)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
        if (writes[odd] && unsigned(row + parity) < unsigned(dx.height))
          *reinterpret_cast<uint4*>(image + (to + parity * row_pitch + odd * t.channels)) =
              load_shared_16(buffer + (2 * parity + odd) * column_bytes + from);
    to += 2 * row_pitch, row += 2;
  }
};

template <class T, int k>
__global__ void __launch_bounds__(kStride2DataGrads[k].threads(), kStride2DataGrads[k].blocks())
    rows_stride2_data_grad(Tiling t, Image size, const T* gradients, const T* weight, T* image_gradients, int tasks) {
  constexpr int kernel = kStride2DataGrads[k].kernel_h, half = (kernel + 1) / 2;
  constexpr int kRing = kStride2DataGrads[k].ring(), kAhead = kStride2DataGrads[k].ahead();
  extern __shared__ __align__(128) unsigned char memory[];
  const int channel_block = blockIdx.x % t.channel_blocks, first_task = blockIdx.x / t.channel_blocks;
  const int step = gridDim.x / t.channel_blocks;
  const Lane lane(t, channel_block);
  const uint32_t row_bytes = t.width * t.pitch * 16, column_bytes = kStrip * t.pitch * 16;
  const uint32_t ring = opaque(shared_address(memory)), buffers = ring + kRing * row_bytes;
  const uint32_t put_at = buffers + (threadIdx.x % 32 * t.pitch + threadIdx.x / 32) * 16;
  ParityTaps<T, kernel> taps;
  taps.load(t, weight, (channel_block * t.groups + threadIdx.x / 32) * 8);

  Task task;
  RowLoader<T, kStride2DataGrads[k].slots> grads;
  Operands<half, 1> operands;
  PairWriter<T> writer;
  for (int number = first_task; number < tasks; number += step) {
    if (task.move_to(t, number)) {
      grads.template init_inputs<1>(t, task, lane);
      operands.init(t, task.strip);
      writer.init(t, task, lane, size);
    }
    const uint32_t group = task.group * (t.group_images * t.in_h * t.in_w * t.channels);
    writer.to = writer.begin + task.group * (t.group_images * size.height * size.width * t.channels);
    writer.row = 2 * task.row - size.top;
    const int first = task.row - t.padding_h, steps = task.rows + half - 1;
    const unsigned end = max(0, min(t.in_h, first + steps));
    const auto load = [&](int s) {
      const int row = first + s;
      const bool inside = unsigned(row) < end;
      grads.load(ring + s % kRing * row_bytes, gradients, group + row * (t.in_w * t.channels), inside);
      cp_async_commit();
    };
    const Inside<1> inside(first, 1, t.in_h);
    const int first_step = min(inside.begin, half - 1);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(first_step + s);
    Sums sums[2][half][2];
#pragma unroll
    for (int i = 0; i < 4 * half; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[i / (2 * half)][i / 2 % half][i % 2][e / 4][e % 4] = 0.f;

    const auto store = [&](int s) {
      if (s >= half) writer.write(t, size, image_gradients, buffers + (s - 1 & 1) * 4 * column_bytes, column_bytes);
    };
    const auto finish = [&](int s) {
      if (s < half - 1) return;
#pragma unroll
      for (int i = 0; i < 4; ++i) put_row<T>(put_at + ((s & 1) * 4 + i) * column_bytes, sums[i / 2][0][i % 2]);
    };
    int s = first_step;
    for (; s < min(inside.end, steps); ++s) {
      cp_async_wait<kAhead - 1>();
      __syncthreads();  // as in rows_convolution
      load(s + kAhead);
      store(s);
      add_gradient_row<T, kernel>(ring + s % kRing * row_bytes, operands, taps, sums);
      finish(s);
    }
    for (; s < steps; ++s) {
      __syncthreads();
      store(s);
      add_nothing<half>(sums);
      finish(s);
    }
    __syncthreads();  // as in rows_convolution
    writer.write(t, size, image_gradients, buffers + (steps - 1 & 1) * 4 * column_bytes, column_bytes);
    cp_async_wait<0>();
  }
}

}  // namespace rows

void launch_rows_stride2_data_grad(const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  using namespace rows;
  by_kernel<sizeof(kStride2DataGrads) / sizeof(Kernel)>(plan.kernel, dtype, [&](auto k, auto zero) {
    using T = decltype(zero);
    constexpr int number = decltype(k)::value;
    constexpr Kernel kernel = kStride2DataGrads[number], tile = halved(kernel);
    allow_shared(reinterpret_cast<const void*>(&rows_stride2_data_grad<T, number>), plan.shared);
    by_images(a.g, [&](int64_t first, int images) {
      const Tiling t =
          tiling(stride2_data_grad_as_pairs(a.g, kernel.kernel_h, kernel.kernel_w), tile, images, plan.rows);
      const Conv2d& g = a.g;
      const Image dx{int(g.in_h), int(g.in_w), g.padding_h % 2, g.padding_w % 2};
      rows_stride2_data_grad<T, number>
          <<<grid("rows_stride2_data_grad", t.blocks(plan.parts)), dim3(32 * t.groups), plan.shared, stream>>>(
              t, dx, image(static_cast<const T*>(a.x), first, g.out_h * g.out_w * g.channels),
              static_cast<const T*>(a.weight), image(static_cast<T*>(a.y), first, g.in_h * g.in_w * g.channels),
              int(t.tasks()));
    });
  });
  check_launch("rows_stride2_data_grad");
}

}  // namespace rkl::cuda
