// Depthwise convolution in registers: the output, and the data gradient at stride 1, which is a convolution, too.
#include "cuda/activation.cuh"
#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "cuda/registers.cuh"
#include "cuda/registers_launch.cuh"

namespace rkl::cuda {
namespace registers {
namespace {

// Adds a row of inputs to the sums of the output rows in flight, of which acc[0] is the oldest. phase: the row's number
// modulo the stride. The first tap of phase 0 adds to acc[j + 1] and writes acc[j], so that the window needs no moves.
template <class T, int kernel, int stride, int phase, int flight, int inputs, int across, int channels, class Word,
          class Taps>
__device__ inline void add_row(const Taps& filter, const Word (&row)[inputs], float (&acc)[flight][across][channels]) {
#pragma unroll
  for (int j = 0; j < flight; ++j) {
    const int kh = (flight - 1 - j) * stride + phase;
    if (kh >= kernel) continue;
    float taps[kernel][channels];
    filter.read(kh, taps);
#pragma unroll
    for (int q = 0; q < inputs; ++q) {
      float v[channels];
      unpack_word<T>(row[q], v);
#pragma unroll
      for (int a = 0; a < across; ++a) {
        const int kw = q - a * stride;
        if (kw < 0 || kw >= kernel) continue;
        const bool moves = phase == 0 && kw == 0;
#pragma unroll
        for (int e = 0; e < channels; ++e) {
          const float before = !moves ? acc[j][a][e] : j + 1 < flight ? acc[j + 1 < flight ? j + 1 : j][a][e] : 0.f;
          acc[j][a][e] = fmaf(v[e], taps[kw][e], before);
        }
      }
    }
  }
}

template <class T, int kernel, int stride, int channels, int across>
__global__ void __launch_bounds__(kThreads, blocks_of(kernel, stride, sizeof(T)))
    convolve_registers(Convolution a, Sizes s, bool flipped) {
  constexpr int kInputs = (across - 1) * stride + kernel, kFlight = (kernel + stride - 1) / stride;
  constexpr bool kShared = kernel > 3;
  __shared__ __align__(8) float memory[kShared ? kernel * kernel * vectors_of(kernel) * channels : 1];
  using Word = typename Raw<T, channels>::Word;
  const int c = (int(blockIdx.x) % s.channel_blocks * s.vectors + int(threadIdx.x)) * channels;
  const Filter<T, kernel, channels, kShared> filter(s, a.weight, flipped, c, memory);
  const int number = int(blockIdx.x) / s.channel_blocks * int(blockDim.y) + int(threadIdx.y);
  if (c >= s.channels || number >= s.tasks()) return;

  const Task task(s, number, across);
  const int y0 = task.y, x0 = task.x, rows = task.rows;
  if (rows <= 0) return;
  int in_y = y0 * stride - s.padding_h;
  const int in_x = x0 * stride - s.padding_w;
  Row<T, channels> in(a.x, s, task.n, s.in_h, s.in_w, in_y, in_x, c);
  Row<T, channels> out(a.y, s, task.n, s.out_h, s.out_w, y0, x0, c);
  const uint32_t in_columns = inside<kInputs>(in_x, s.dilation_w, s.in_w);
  const uint32_t out_columns = inside<across>(x0, s.dilation_w, s.out_w);
  float acc[kFlight][across][channels] = {};

  const auto load = [&](Word(&row)[kInputs]) {  // the next row; zeros outside of the image
    in.load(unsigned(in_y) < unsigned(s.in_h) ? in_columns : 0, row);
    in.at += in.next;
    in_y += s.dilation_h;
  };
  const auto store = [&] {
    float v[across * channels];
#pragma unroll
    for (int i = 0; i < across * channels; ++i) v[i] = acc[0][i / channels][i % channels];
    if (a.bias) {  // read again for each row: kept, it would take registers that the sums need
#pragma unroll
      for (int e = 0; e < channels; ++e) {
        const float bias = to_float(static_cast<const T*>(a.bias)[c + e]);
#pragma unroll
        for (int q = 0; q < across; ++q) v[q * channels + e] += bias;
      }
    }
    activate_all<T>(a.act, v);
#pragma unroll
    for (int q = 0; q < across; ++q) {
      float each[channels];
#pragma unroll
      for (int e = 0; e < channels; ++e) each[e] = v[q * channels + e];
      if (out_columns >> q & 1) out.store(q, each);
    }
    out.at += out.next;
  };
  int left = rows + kFlight - 1;  // steps, of which the first kFlight - 1 complete no row
  Word even[kInputs], odd[kInputs];
  load(even);
  while (true) {
    if constexpr (stride == 1) {
      load(odd);
      add_row<T, kernel, 1, 0, kFlight>(filter, even, acc);
      if (left <= rows) store();
      if (--left == 0) return;
      load(even);
      add_row<T, kernel, 1, 0, kFlight>(filter, odd, acc);
    } else {
      load(odd);
      add_row<T, kernel, 2, 0, kFlight>(filter, even, acc);
      load(even);
    }
    if (left <= rows) store();
    if (--left == 0) return;
    if constexpr (stride == 2) add_row<T, kernel, 2, 1, kFlight>(filter, odd, acc);
  }
}

template <class T, int kernel, int stride, int channels, int across>
void launch(const Convolution& a, bool flipped, const Plan& plan, cudaStream_t stream) {
  const Sizes s = sizes_of(a.g, plan.rows, across, channels, vectors_of(kernel));
  const dim3 threads(unsigned(s.vectors), unsigned(plan.threads / s.vectors));
  convolve_registers<T, kernel, stride, channels, across>
      <<<grid("convolve_registers", plan.blocks), threads, 0, stream>>>(a, s, flipped);
  check_launch("convolve_registers");
}

}  // namespace

void launch_convolution(const Convolution& a, bool flipped, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  by_kernel(plan.kernel, a.g.stride_h, dtype, [&](auto zero, auto kernel, auto stride) {
    using T = decltype(zero);
    constexpr int kChannels = channels_of(kernel, sizeof(T));
    if constexpr (kernel == 3)
      if (is_narrow(a.g, kernel)) return launch<T, kernel, stride, kChannels, kNarrow>(a, flipped, plan, stream);
    launch<T, kernel, stride, kChannels, kAcross>(a, flipped, plan, stream);
  });
}

}  // namespace registers
}  // namespace rkl::cuda
