// Separable convolution in one kernel by the row pipeline (rows.cuh): the depthwise output never leaves the chip.
//
// A block makes all channels of a strip and slides down the image. In each step it writes a row of the depthwise output
// to shared memory, multiplies the row before it by the pointwise filters, and stores the row before that, with one
// barrier a row. The product loads its left operand from the depthwise row, 16 pixels by 16 channels at a time. A warp
// makes 16 pixels by a slice of the output channels, whose filters it keeps in registers.
#include <algorithm>

#include "cuda/activation.cuh"
#include "cuda/rows_launch.cuh"
#include "cuda/separable_rows.h"

namespace rkl::cuda {
namespace rows {

struct SeparableArguments {
  const void *x, *depthwise, *pointwise, *depthwise_bias, *pointwise_bias;
  void* y;
  Activation inner, act;
};

// A slice's filters as right operands of 16 channels by two times 8 outputs, and its outputs' biases.
template <class T, int deep, int wide>
struct PointwiseFilters {
  uint32_t b[wide][deep][4];
  float bias[wide][2][2];

  // outputs: how many there are in all; first: the slice's first output.
  __device__ void load(const T* weight, const T* biases, int channels, int outputs, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < wide; ++e)
#pragma unroll
      for (int d = 0; d < deep; ++d)
#pragma unroll
        for (int m = 0; m < 4; ++m) {  // m / 2: which 8 outputs; m % 2: which half of the channels
          const int o = first + e * 16 + m / 2 * 8 + lane / 4, c = d * 16 + m % 2 * 8 + lane % 4 * 2;
          b[e][d][m] = o < outputs && c < channels ? *reinterpret_cast<const uint32_t*>(weight + o * channels + c) : 0;
        }
#pragma unroll
    for (int e = 0; e < wide; ++e)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int o = first + e * 16 + i / 2 * 8 + lane % 4 * 2 + i % 2;
        bias[e][i / 2][i % 2] = biases && o < outputs ? to_float(biases[o]) : 0.f;
      }
  }
};

// Writes a thread's 16-byte pieces of a finished row of outputs, whose channels need not be as many as the inputs'.
template <class T, int pieces>
struct OutputWriter {
  uint32_t begin[pieces], from[pieces];
  uint32_t row, pitch;  // elements: of the next row beyond `begin`, and from a row to the next
  bool writes[pieces];

  __device__ void init(const Tiling& t, const Task& task, const SeparableTiling& out) {
    const int vectors = out.outputs / 8;
    pitch = t.out_w * out.outputs;
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      const int piece = threadIdx.x + i * blockDim.x, pixel = piece / vectors, vector = piece - pixel * vectors;
      const int o = pixel / kOctet, image = task.strip.image_of(o), column = task.strip.column(o) + pixel % kOctet;
      writes[i] = pixel < kStrip && image < task.images && column < t.out_w;
      begin[i] = ((image * t.out_h + task.row) * t.out_w + column) * out.outputs + vector * 8;
      from[i] = (pixel * out.output_pitch + vector) * 16;
    }
  }
  __device__ void write(T* images, uint32_t buffer) {
#pragma unroll
    for (int i = 0; i < pieces; ++i)
      if (writes[i]) *reinterpret_cast<uint4*>(images + (begin[i] + row)) = load_shared_16(buffer + from[i]);
    row += pitch;
  }
};

template <class T, int k, bool activated>
__global__ void __launch_bounds__(kSeparableKernels[k].window.threads(), kSeparableKernels[k].window.blocks())
    separable_rows(Tiling t, SeparableTiling out, SeparableArguments a, int tasks) {
  constexpr Kernel window = kSeparableKernels[k].window;
  constexpr int kernel_h = window.kernel_h, kernel_w = window.kernel_w, stride = window.stride;
  constexpr int kRing = window.ring(), kAhead = window.ahead();
  constexpr int flight = in_flight(kernel_h, stride), deep = kSeparableKernels[k].deep,
                wide = kSeparableKernels[k].wide;
  extern __shared__ __align__(128) unsigned char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slices = t.groups / 2;
  const Lane my(t, 0);
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const uint32_t row_bytes = t.width * t.pitch * 16, hidden_bytes = kStrip * out.hidden_pitch * 16;
  const uint32_t output_bytes = kStrip * out.output_pitch * 16;
  const uint32_t ring = opaque(shared_address(memory)), hidden = ring + kRing * row_bytes;
  const uint32_t outputs = hidden + 2 * hidden_bytes;
  const uint32_t put_at = opaque(hidden + (lane * out.hidden_pitch + warp) * 16);
  Taps<T, kernel_h, kernel_w> taps;
  taps.load(t, static_cast<const T*>(a.depthwise), warp * 8, false);
  float begin[4] = {};
  const int c = warp * 8 + lane % 4 * 2;
  if (a.depthwise_bias && c < t.channels)
#pragma unroll
    for (int i = 0; i < 4; ++i) begin[i] = to_float(static_cast<const T*>(a.depthwise_bias)[c + i % 2]);
  // This warp's share of the product: 16 pixels by a slice.
  const int half = warp / slices, first_output = (warp - half * slices) * wide * 16;
  PointwiseFilters<T, deep, wide> filters;
  filters.load(static_cast<const T*>(a.pointwise), static_cast<const T*>(a.pointwise_bias), t.channels, out.outputs,
               first_output);
  const uint32_t take_at = opaque(hidden + ((half * 16 + lane % 16) * out.hidden_pitch + lane / 16) * 16);
  const uint32_t give_at =
      opaque(outputs + ((half * 16 + lane % 16) * out.output_pitch + first_output / 8 + lane / 16) * 16);
  // Channels that no warp makes are set to zero in both depthwise rows. Their filters are zero, but zero times what
  // shared memory happens to hold may be NaN.
  for (int i = threadIdx.x; i < 2 * kStrip * (2 * deep - t.groups); i += blockDim.x) {
    const int pixel = i / (2 * deep - t.groups), piece = t.groups + i % (2 * deep - t.groups);
#pragma unroll
    for (int word = 0; word < 4; ++word) store_shared_4(hidden + (pixel * out.hidden_pitch + piece) * 16 + word * 4, 0);
  }

  Task task;
  RowLoader<T, window.slots> inputs;
  Operands<kernel_w, stride> operands;
  OutputWriter<T, wide> writer;
  for (int number = blockIdx.x; number < tasks; number += gridDim.x) {
    if (task.move_to(t, number)) {
      inputs.template init_inputs<stride>(t, task, my);
      operands.init(t, task.strip);
      writer.init(t, task, out);
    }
    const uint32_t group = task.group * (t.group_images * t.in_h * t.in_w * t.channels);
    writer.row = task.group * (t.group_images * t.out_h * t.out_w * out.outputs);
    const int first = task.row * stride - t.padding_h, rows = task.rows;
    const unsigned end = max(0, min(t.in_h, first + (rows - 1) * stride + kernel_h));
    const auto load = [&](int s) {
      const int row = first + s;
      const bool inside = unsigned(row) < end;
      inputs.load(ring + s % kRing * row_bytes, x, group + row * (t.in_w * t.channels), inside);
      cp_async_commit();
    };
    const auto multiply = [&](uint32_t from, uint32_t to) {
      float sum[wide][2][4];
#pragma unroll
      for (int i = 0; i < wide * 8; ++i) sum[i / 8][i / 4 % 2][i % 4] = filters.bias[i / 8][i / 4 % 2][i % 2];
#pragma unroll
      for (int d = 0; d < deep; ++d) {
        uint32_t in[4];
        ldmatrix_x4(in, from + d * 32);
#pragma unroll
        for (int e = 0; e < wide; ++e)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            mma_m16n8k16<T>(sum[e][i], in, filters.b[e][d][2 * i], filters.b[e][d][2 * i + 1], sum[e][i]);
      }
#pragma unroll
      for (int e = 0; e < wide; ++e)
        if (first_output + e * 16 < out.outputs) {
          if constexpr (activated) activate_all<T, true>(a.act, flat(sum[e]));
          put_row<T>(to + e * 32, sum[e]);
        }
    };
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(s);
    Sums sums[flight];
#pragma unroll
    for (int i = 0; i < flight * 8; ++i) sums[i / 8][i / 4 % 2][i % 4] = 0.f;

    // Step s completes depthwise row s - (flight - 1), multiplies the row before it and stores the row before that. The
    // last two steps read nothing from the ring, so their barriers allow the next task to copy into it.
    for (int s = 0; s < rows + flight + 1; ++s) {
      const int row = s - (flight - 1);
      cp_async_wait<kAhead - stride>();
      __syncthreads();  // as in rows_convolution; also, the step before has written its depthwise row and its outputs
#pragma unroll
      for (int i = 0; i < stride; ++i) load(s * stride + kAhead + i);
      if (row >= 2) writer.write(y, outputs + (row & 1) * output_bytes);
      if (row >= 1 && row <= rows)
        multiply(take_at + (row - 1 & 1) * hidden_bytes, give_at + (row - 1 & 1) * output_bytes);
      if (row >= rows) continue;
      add_row<T, kernel_h, kernel_w, stride, 0>(ring + s * stride % kRing * row_bytes, operands, taps, begin, sums);
      if constexpr (stride == 2)
        add_row<T, kernel_h, kernel_w, stride, 1>(ring + (s * 2 + 1) % kRing * row_bytes, operands, taps, begin, sums);
      if (row >= 0) {
        if constexpr (activated) activate_all<T, true>(a.inner, flat(sums[0]));
        put_row<T>(put_at + (row & 1) * hidden_bytes, sums[0]);
      }
    }
    cp_async_wait<0>();
  }
}

}  // namespace rows

void fused_separable(const Plan& plan, const Conv2d& g, int64_t c_out, const void* x, const void* depthwise,
                     const void* pointwise, const void* depthwise_bias, const void* pointwise_bias, Activation inner,
                     Activation act, void* y, Dtype dtype, cudaStream_t stream) {
  using namespace rows;
  const int most = std::min(images_at_once(g), images_at_once(outputs_of(g, c_out)));
  by_kernel<sizeof(kSeparableKernels) / sizeof(SeparableKernel)>(plan.kernel, dtype, [&](auto k, auto zero) {
    by_flag(inner != Activation::none || act != Activation::none, [&](auto activated) {
      using T = decltype(zero);
      constexpr int number = decltype(k)::value;
      constexpr bool with = decltype(activated)::value;
      allow_shared(reinterpret_cast<const void*>(&separable_rows<T, number, with>), plan.shared);
      for (int64_t first = 0; first < g.batch; first += most) {
        const int images = int(std::min<int64_t>(most, g.batch - first));
        const Tiling t = separable_tiling(g, kSeparableKernels[number], images, plan.rows);
        const SeparableArguments a{image(static_cast<const T*>(x), first, g.in_h * g.in_w * g.channels),
                                   depthwise,
                                   pointwise,
                                   depthwise_bias,
                                   pointwise_bias,
                                   image(static_cast<T*>(y), first, g.out_h * g.out_w * c_out),
                                   inner,
                                   act};
        separable_rows<T, number, with>
            <<<grid("separable_rows", t.blocks(plan.parts)), dim3(32 * t.groups), plan.shared, stream>>>(
                t, separable_outputs(kSeparableKernels[number], c_out), a, int(t.tasks()));
      }
    });
  });
  check_launch("separable_rows");
}

}  // namespace rkl::cuda
