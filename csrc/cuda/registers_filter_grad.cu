// The gradient of the filter (and of the bias) in registers, and with it that of the image at 3 x 3, stride 1.
//
// A thread keeps the sums of all taps of its channels through all its tasks. In each task it slides down the image and
// keeps in registers the rows of gradients that a row of inputs meets. It loads each input of the next row right after
// the last use of this row's, into the same register, so that the next row takes no registers of its own.
#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "cuda/registers.cuh"
#include "cuda/registers_launch.cuh"

namespace rkl::cuda {
namespace registers {
namespace {

// Adds a block's sums over its threads along y, in order, and writes them to the workspace. The bias's come last.
template <int kernel, int channels>
__device__ inline void write_sums(const FilterGrad& a, int part, int c,
                                  const float (&sums)[kernel * kernel + 1][channels]) {
  constexpr int kSums = (kernel * kernel + 1) * channels, kAtOnce = 10;
  __shared__ float memory[kAtOnce][kThreads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int first = 0; first < kSums; first += kAtOnce) {
    __syncthreads();  // the sums before these have been added
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i < kSums) memory[i][thread] = sums[(first + i) / channels][(first + i) % channels];
    __syncthreads();
    for (int i = threadIdx.y; i < kAtOnce; i += blockDim.y) {
      const int tap = (first + i) / channels, e = (first + i) % channels, kh = tap / kernel, kw = tap % kernel;
      const bool of_bias = tap == kernel * kernel;
      if (first + i >= kSums || c >= a.g.channels) continue;
      if (!of_bias && (kh >= a.g.kernel_h || kw >= a.g.kernel_w)) continue;
      float sum = 0.f;
      for (int y = 0; y < int(blockDim.y); ++y) sum += memory[i][y * blockDim.x + threadIdx.x];
      a.sum(part, of_bias ? a.g.kernel_h * a.g.kernel_w : kh * a.g.kernel_w + kw, c + e) = sum;
    }
  }
}

// s: the sizes of the forward convolution. Output row y0 + t meets input row t * stride + kh of the task with the
// filter's row kh. Step t loads that output row's gradients; they lie in grads[t % flight].
template <class T, int kernel, int stride, int channels>
__global__ void __launch_bounds__(kThreads, filter_grad_blocks_of(kernel, stride, sizeof(T)))
    filter_grad_registers(FilterGrad a, Sizes s, int parts) {
  constexpr int kInputs = (kAcross - 1) * stride + kernel, kFlight = (kernel + stride - 1) / stride;
  using Word = typename Raw<T, channels>::Word;
  const int part = int(blockIdx.x) / s.channel_blocks;
  const int c = (int(blockIdx.x) % s.channel_blocks * s.vectors + int(threadIdx.x)) * channels;
  const int tasks = c < s.channels ? s.tasks() : 0;
  float sums[kernel * kernel + 1][channels] = {};

  for (int number = part * int(blockDim.y) + int(threadIdx.y); number < tasks; number += parts * int(blockDim.y)) {
    const Task task(s, number, kAcross);
    if (task.rows <= 0) continue;
    int in_y = task.y * stride - s.padding_h;
    const int in_x = task.x * stride - s.padding_w;
    Row<T, channels> in(a.x, s, task.n, s.in_h, s.in_w, in_y, in_x, c);
    Row<T, channels> out(a.grad, s, task.n, s.out_h, s.out_w, task.y, task.x, c);
    const uint32_t in_columns = inside<kInputs>(in_x, s.dilation_w, s.in_w);
    const uint32_t out_columns = inside<kAcross>(task.x, s.dilation_w, s.out_w);
    const auto row_mask = [&] { return unsigned(in_y) < unsigned(s.in_h) ? in_columns : 0; };
    float grads[kFlight][kAcross][channels] = {};
    Word x[kInputs], next[kAcross];
    in.load(row_mask(), x);
    out.load(out_columns, next);
    const int steps = task.rows + kFlight - 1;
    for (int t = 0; t < steps;) {
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
#pragma unroll
        for (int q = 0; q < kAcross; ++q) {
          unpack_word<T>(next[q], grads[u][q]);
#pragma unroll
          for (int e = 0; e < channels; ++e) sums[kernel * kernel][e] += grads[u][q][e];
        }
        out.at += out.next;
        out.load(t + 1 < task.rows ? out_columns : 0, next);
#pragma unroll
        for (int phase = 0; phase < stride; ++phase) {
          in_y += s.dilation_h;
          in.at += in.next;
          const uint32_t wanted = row_mask();
#pragma unroll
          for (int q = 0; q < kInputs; ++q) {
            float v[channels];
            unpack_word<T>(x[q], v);
            x[q] = in.load(wanted, q);
#pragma unroll
            for (int p = 0; p < kAcross; ++p) {
              const int kw = q - p * stride;
              if (kw < 0 || kw >= kernel) continue;
#pragma unroll
              for (int kh = phase; kh < kernel; kh += stride)
#pragma unroll
                for (int e = 0; e < channels; ++e)
                  sums[kh * kernel + kw][e] =
                      fmaf(v[e], grads[(u - kh / stride + kFlight) % kFlight][p][e], sums[kh * kernel + kw][e]);
            }
          }
        }
        if (++t == steps) break;
      }
    }
  }
  write_sums<kernel, channels>(a, part, c, sums);
}

// Both gradients at 3 x 3 where the output has the image's size. One pass moves three tensors, two passes move four. A
// task is rows and columns of dx; gradient row y0 + t - 1 lies in grads[t % 3].
template <class T, int channels>
__global__ void __launch_bounds__(kThreads, kBothBlocks) both_grads_registers(FilterGrad a, Sizes s, int parts) {
  constexpr int kernel = 3, kInputs = kAcross + kernel - 1;
  using Word = typename Raw<T, channels>::Word;
  const int part = int(blockIdx.x) / s.channel_blocks;
  const int c = (int(blockIdx.x) % s.channel_blocks * s.vectors + int(threadIdx.x)) * channels;
  const int tasks = c < s.channels ? s.tasks() : 0;
  const Filter<T, kernel, channels, false> filter(s, a.weight, false, c, nullptr);
  float sums[kernel * kernel + 1][channels] = {};

  for (int number = part * int(blockDim.y) + int(threadIdx.y); number < tasks; number += parts * int(blockDim.y)) {
    const Task task(s, number, kAcross);
    if (task.rows <= 0) continue;
    int grad_y = task.y - s.dilation_h;
    const int grad_x = task.x - s.dilation_w;
    Row<T, channels> grad(a.grad, s, task.n, s.out_h, s.out_w, grad_y, grad_x, c);
    Row<T, channels> image(a.x, s, task.n, s.in_h, s.in_w, task.y, task.x, c);
    Row<T, channels> dx(a.dx, s, task.n, s.in_h, s.in_w, task.y, task.x, c);
    const uint32_t grad_columns = inside<kInputs>(grad_x, s.dilation_w, s.out_w);
    const uint32_t columns = inside<kAcross>(task.x, s.dilation_w, s.in_w);
    float grads[kernel][kInputs][channels];
    Word next[kInputs], x[kAcross];
    const auto load_grads = [&](bool wanted) {
      grad.load(wanted && unsigned(grad_y) < unsigned(s.out_h) ? grad_columns : 0, next);
      grad_y += s.dilation_h;
      grad.at += grad.next;
    };
    const auto take = [&](float (&row)[kInputs][channels]) {
#pragma unroll
      for (int q = 0; q < kInputs; ++q) unpack_word<T>(next[q], row[q]);
    };
    load_grads(true);
    take(grads[0]);
    load_grads(true);
    take(grads[1]);
    load_grads(true);
    image.load(columns, x);
    for (int t = 0; t < task.rows;) {
#pragma unroll
      for (int u = 0; u < kernel; ++u) {
        take(grads[(u + 2) % kernel]);
        load_grads(t + 1 < task.rows);
        image.at += image.next;
        const uint32_t wanted = t + 1 < task.rows ? columns : 0;
#pragma unroll
        for (int p = 0; p < kAcross; ++p) {
          float v[channels], made[channels] = {};
          unpack_word<T>(x[p], v);
          x[p] = image.load(wanted, p);
#pragma unroll
          for (int kh = 0; kh < kernel; ++kh)
#pragma unroll
            for (int kw = 0; kw < kernel; ++kw)
#pragma unroll
              for (int e = 0; e < channels; ++e) {
                const float g = grads[(u + 2 - kh) % kernel][p + 2 - kw][e];
                made[e] = fmaf(g, filter.v[kh * kernel + kw][e], made[e]);
                sums[kh * kernel + kw][e] = fmaf(g, v[e], sums[kh * kernel + kw][e]);
              }
#pragma unroll
          for (int e = 0; e < channels; ++e) sums[kernel * kernel][e] += grads[(u + 1) % kernel][p + 1][e];
          if (columns >> p & 1) dx.store(p, made);
        }
        dx.at += dx.next;
        if (++t == task.rows) break;
      }
    }
  }
  write_sums<kernel, channels>(a, part, c, sums);
}

dim3 threads_of(const Sizes& s, const Plan& plan) {
  return dim3(unsigned(s.vectors), unsigned(plan.threads / s.vectors));
}

template <class T, int kernel, int stride>
void launch_filter_grad(const FilterGrad& a, const Plan& plan, cudaStream_t stream) {
  constexpr int kChannels = filter_grad_channels_of(kernel, stride, sizeof(T));
  const Sizes s = sizes_of(a.g, plan.rows, kAcross, kChannels, vectors_of(kernel));
  filter_grad_registers<T, kernel, stride, kChannels>
      <<<grid("filter_grad_registers", plan.blocks), threads_of(s, plan), 0, stream>>>(a, s, plan.parts);
  check_launch("filter_grad_registers");
}

}  // namespace

void launch_filter_grad(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  by_kernel(plan.kernel, a.g.stride_h, dtype, [&](auto zero, auto kernel, auto stride) {
    launch_filter_grad<decltype(zero), kernel, stride>(a, plan, stream);
  });
}

void launch_both_grads(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const Sizes s = sizes_of(a.g, plan.rows, kAcross, kBothChannels, vectors_of(3));
    both_grads_registers<T, kBothChannels>
        <<<grid("both_grads_registers", plan.blocks), threads_of(s, plan), 0, stream>>>(a, s, plan.parts);
  });
  check_launch("both_grads_registers");
}

}  // namespace registers
}  // namespace rkl::cuda
