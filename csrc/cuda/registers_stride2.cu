// The data gradient at stride 2 in registers: two rows and two columns of dx at a time (stride2_data_grad_as_pairs in
// plan.h), so that each gradient that is loaded serves all of them.
#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "cuda/registers.cuh"
#include "cuda/registers_launch.cuh"

namespace rkl::cuda {
namespace registers {
namespace {

// dx's size, and the row and column that its first pair begins with: 0, or the one before where the padding is odd.
struct Image {
  int h, w, y, x;
};

// Adds a row of gradients to the sums of the pairs of rows in flight, which completes acc[0]. The even row of pair j
// meets it with the filter's row 2 j, the odd row with row 2 j + 1. As in registers_convolution.cu, the first tap adds
// to acc[j + 1] and writes acc[j].
template <class T, int kernel, int half, int inputs, int channels, class Word, class Taps>
__device__ inline void add_row(const Taps& filter, const Word (&row)[inputs],
                               float (&acc)[half][kPairsAcross][2][2][channels]) {
#pragma unroll
  for (int j = 0; j < half; ++j)
#pragma unroll
    for (int odd_h = 0; odd_h < 2; ++odd_h) {
      const int kh = 2 * j + odd_h;
      if (kh >= kernel) continue;
      const bool begins = kh + 2 >= kernel;
      float taps[kernel][channels];
      filter.read(kh, taps);
#pragma unroll
      for (int q = 0; q < inputs; ++q) {
        float v[channels];
        unpack_word<T>(row[q], v);
#pragma unroll
        for (int a = 0; a < kPairsAcross; ++a)
#pragma unroll
          for (int odd_w = 0; odd_w < 2; ++odd_w) {
            const int pair = a + half - 1 - q, kw = 2 * pair + odd_w;
            if (pair < 0 || kw >= kernel) continue;
            const bool moves = kw + 2 >= kernel;
#pragma unroll
            for (int e = 0; e < channels; ++e) {
              float& sum = acc[j][a][odd_h][odd_w][e];
              const float before = !moves ? sum : begins ? 0.f : acc[j + 1 < half ? j + 1 : j][a][odd_h][odd_w][e];
              sum = fmaf(v[e], taps[kw][e], before);
            }
          }
      }
    }
}

// s: the sizes of the convolution of pairs.
template <class T, int kernel, int channels>
__global__ void __launch_bounds__(kThreads, data_grad_blocks_of(kernel))
    stride2_grad_registers(Convolution a, Sizes s, Image image) {
  constexpr int kHalf = (kernel + 1) / 2, kInputs = kPairsAcross + kHalf - 1;
  constexpr bool kShared = kernel > 3;
  __shared__ __align__(8) float memory[kShared ? kernel * kernel * vectors_of(kernel) * channels : 1];
  using Word = typename Raw<T, channels>::Word;
  const int c = (int(blockIdx.x) % s.channel_blocks * s.vectors + int(threadIdx.x)) * channels;
  const Filter<T, kernel, channels, kShared> filter(s, a.weight, false, c, memory);
  const int number = int(blockIdx.x) / s.channel_blocks * int(blockDim.y) + int(threadIdx.y);
  if (c >= s.channels || number >= s.tasks()) return;

  const Task task(s, number, kPairsAcross);
  int in_y = task.y - s.padding_h, y = image.y + 2 * task.y;
  const int in_x = task.x - s.padding_w, x = image.x + 2 * task.x;
  Row<T, channels> in(a.x, s, task.n, s.in_h, s.in_w, in_y, in_x, c);
  Row<T, channels> out(a.y, s, task.n, image.h, image.w, y, x, c);
  const uint32_t in_columns = inside<kInputs>(in_x, 1, s.in_w);
  const uint32_t out_columns = inside<2 * kPairsAcross>(x, 1, image.w);
  float acc[kHalf][kPairsAcross][2][2][channels] = {};

  const auto load = [&](Word(&row)[kInputs]) {
    in.load(unsigned(in_y) < unsigned(s.in_h) ? in_columns : 0, row);
    in.at += in.next;
    ++in_y;
  };
  const auto store = [&] {
#pragma unroll
    for (int odd_h = 0; odd_h < 2; ++odd_h, ++y, out.at += out.next) {
      const uint32_t wanted = unsigned(y) < unsigned(image.h) ? out_columns : 0;
#pragma unroll
      for (int q = 0; q < 2 * kPairsAcross; ++q)
        if (wanted >> q & 1) out.store(q, acc[0][q / 2][odd_h][q % 2]);
    }
  };
  int left = task.rows + kHalf - 1;
  Word even[kInputs], odd[kInputs];
  load(even);
  while (true) {
    load(odd);
    add_row<T, kernel>(filter, even, acc);
    if (left <= task.rows) store();
    if (--left == 0) return;
    load(even);
    add_row<T, kernel>(filter, odd, acc);
    if (left <= task.rows) store();
    if (--left == 0) return;
  }
}

template <class T, int kernel>
void launch(const Convolution& a, const Plan& plan, cudaStream_t stream) {
  constexpr int kChannels = channels_of(kernel, sizeof(T));
  const Conv2d &g = a.g, pairs = stride2_data_grad_as_pairs(g, kernel, kernel);
  const Image image{int(g.in_h), int(g.in_w), -(g.padding_h % 2), -(g.padding_w % 2)};
  const Sizes s = sizes_of(pairs, plan.rows, kPairsAcross, kChannels, vectors_of(kernel));
  const dim3 threads(unsigned(s.vectors), unsigned(plan.threads / s.vectors));
  stride2_grad_registers<T, kernel, kChannels>
      <<<grid("stride2_grad_registers", plan.blocks), threads, 0, stream>>>(a, s, image);
  check_launch("stride2_grad_registers");
}

}  // namespace

void launch_stride2_data_grad(const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  by_kernel(plan.kernel, 2, dtype, [&](auto zero, auto kernel, auto stride) {
    if constexpr (stride == 2) launch<decltype(zero), kernel>(a, plan, stream);
  });
}

}  // namespace registers
}  // namespace rkl::cuda
