// Separable convolution on a GPU in one kernel: the depthwise output never leaves the chip.
//
// A block makes a tile of output pixels by output channels. It goes through the input channels in chunks of 32: the
// image's part of the tile comes by asynchronous copies, the depthwise step writes its 16-bit result to shared memory,
// and from there it is the left operand of a product on the tensor cores, summed in fp32 over the chunks. While a chunk
// is worked on, the copies of the next are under way. Bias and activation follow in registers' precision at the end.
//
// Where the output channels do not fit into one tile, every tile of them makes the depthwise output again:
// fused_separable_pays says up to where that is cheaper than writing and reading it.
#include "cuda/separable.cuh"

namespace rkl::cuda {
namespace {

using namespace separable;

constexpr int kChunk = 32;  // 64 bytes of a pixel: two sectors
constexpr int kRow = kPitch<kChunk>;

// A warp has 32 pixels by 64 output channels: 64 sums a thread. Eight warps make 64 by 256, or 128 by 128, whose halo
// is smaller, for up to 128 output channels; at stride 2 the larger halo would leave one block a processor.
template <int pixels>
struct Shape {
  static constexpr int warps_down = pixels / 32, warps_across = kWarps / warps_down, outputs = warps_across * 64;
  static constexpr int strip = pixels / 16;  // neighbouring pixels a thread makes in the depthwise step
};

template <class T>
struct Arguments {
  const T *x, *depthwise, *pointwise, *depthwise_bias, *pointwise_bias;
  T* y;
  Conv2d g;
  Tiling tiling;
  int c_out, output_tiles;
  int columns;  // output channels of a tile for which there is room in shared memory: a multiple of 16
  Activation inner, activation;
};

constexpr int kStageRow = 72;  // floats: rows of a warp's results fall into different banks
constexpr int kStageBytes = kWarps * 16 * kStageRow * int(sizeof(float));

// The block's shared memory. The results take the operands' place at the end.
template <class T, int k, int pixels>
struct Shared {
  T *halo, *rows, *columns;
  float* filters;
  float* stage;
  int *in_pixel, *out_pixel;
  int halo_size, columns_size, bytes;

  __host__ __device__ Shared(unsigned char* base, int halo_pixels, int n_columns) {
    halo_size = halo_pixels * kRow;
    columns_size = n_columns * kRow;
    out_pixel = reinterpret_cast<int*>(base);
    in_pixel = out_pixel + pixels;
    unsigned char* operands = base + ((pixels + halo_pixels) * int(sizeof(int)) + 127) / 128 * 128;
    stage = reinterpret_cast<float*>(operands);
    filters = reinterpret_cast<float*>(operands);
    rows = reinterpret_cast<T*>(filters + 2 * Filters<T, k, kChunk>::kFloats);
    columns = rows + pixels * kRow;
    halo = columns + 2 * columns_size;
    const int operand_bytes = int(reinterpret_cast<unsigned char*>(halo + 2 * halo_size) - operands);
    bytes = int(operands - base) + (operand_bytes > kStageBytes ? operand_bytes : kStageBytes);
  }
};

// Starts the copies of a chunk of the pointwise filters: rows of one output channel's weights.
template <class T>
__device__ inline void copy_pointwise(const Arguments<T>& a, int output, int channel, T* shared) {
  constexpr int vectors = kChunk / 8;
  const int channels = int(a.g.channels);
#pragma unroll 1
  for (int v = threadIdx.x; v < a.columns * vectors; v += kThreads) {
    const int o = output + v / vectors, c = channel + v % vectors * 8;
    const bool inside = o < a.c_out && c < channels;
    cp_async_16(shared + v / vectors * kRow + v % vectors * 8,
                inside ? a.pointwise + int64_t(o) * channels + c : a.pointwise, inside ? 16 : 0);
  }
}

// The depthwise step of one chunk: every thread makes 2 channels of a strip of pixels, as rows of the left operand.
template <class T, int k, int stride, int pixels>
__device__ inline void depthwise_tile(const Arguments<T>& a, const T* halo, const float* filters, T* rows) {
  constexpr int strip = Shape<pixels>::strip, pairs = kChunk / 2;
  // A warp reads two strips at once. They are to begin 64 bytes apart modulo 128, so as to read different banks: in the
  // same row 4 pixels of the halo apart, else one row (k = 5) or two rows apart. This bit of a strip's number says so.
  constexpr int other = strip * stride == 4 ? 0 : k == 5 && stride == 1 ? 1 : 2;
  const int n = threadIdx.x / pairs, differ = (n ^ n >> other) & 1, s = n ^ (differ | differ << other);
  const int channel = threadIdx.x % pairs * 2, m = s * strip;
  float sum[strip * 2];
  depthwise_strip<T, k, stride, kChunk, strip>(halo + halo_pixel<stride>(a.tiling, m) * kRow + channel,
                                               a.tiling.halo_width, filters + channel, sum);
  activate_all<T>(a.inner, sum);
#pragma unroll
  for (int pixel = 0; pixel < strip; ++pixel)
    *reinterpret_cast<Vec<T, 2>*>(rows + (m + pixel) * kRow + channel) = {from_float<T>(sum[pixel * 2]),
                                                                          from_float<T>(sum[pixel * 2 + 1])};
}

// sums += rows * columns^T over one chunk. Output channels that the tile does not have cost nothing.
template <class T>
__device__ inline void multiply(const T* rows, const T* columns, int columns_left, float (&sums)[2][8][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1  // both steps' operands at once do not fit into registers beside the sums
  for (int step = 0; step < kChunk; step += 16) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) ldmatrix_x4(a[i], rows + (i * 16 + lane % 16) * kRow + step + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      if (j * 8 >= columns_left) continue;  // the whole warp
      uint32_t b[4];
      ldmatrix_x4(b, columns + (j * 8 + lane / 16 * 8 + lane % 8) * kRow + step + lane / 8 % 2 * 8);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma_m16n8k16<T>(sums[i][j], a[i], {b[0], b[1]});
        mma_m16n8k16<T>(sums[i][j + 1], a[i], {b[2], b[3]});
      }
    }
  }
}

// Bias, activation and stores of a warp's 32 pixels by 64 output channels, 16 pixels at a time through shared memory:
// from the tensor cores' scattered pairs to 16 bytes a lane.
template <class T>
__device__ inline void store_outputs(const Arguments<T>& a, T* y, int output, const int* pixel, float* stage,
                                     const float (&sums)[2][8][4]) {
  const int lane = threadIdx.x % 32, column = lane % 8 * 8, c = output + column;
  float bias[8] = {};
  if (a.pointwise_bias && c < a.c_out)
    for (int i = 0; i < 8; ++i) bias[i] = to_float(a.pointwise_bias[c + i]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        *reinterpret_cast<Vec<float, 2>*>(stage + (lane / 4 + i * 4) * kStageRow + j * 8 + lane % 4 * 2) = {
            sums[half][j][i], sums[half][j][i + 1]};
    __syncwarp();
#pragma unroll 1
    for (int row = lane / 8; row < 16; row += 4) {
      const int p = pixel[half * 16 + row];
      if (p < 0 || c >= a.c_out) continue;
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = stage[row * kStageRow + column + i] + bias[i];
      activate_all<T>(a.activation, v);
      Vec<T> out;
#pragma unroll
      for (int i = 0; i < 8; ++i) out.v[i] = from_float<T>(v[i]);
      *reinterpret_cast<Vec<T>*>(y + int64_t(p) * a.c_out + c) = out;
    }
    __syncwarp();
  }
}

template <class T, int k, int stride, int pixels>
__global__ void __launch_bounds__(kThreads, 2) separable_forward(const Arguments<T> a) {
  using S = Shape<pixels>;
  extern __shared__ __align__(128) unsigned char shared[];
  const Shared<T, k, pixels> s(shared, a.tiling.halo(), a.columns);
  const int channels = int(a.g.channels), warp = threadIdx.x / 32, halo = a.tiling.halo();
  // Tiles that share their pixels are neighbours in the grid: the second finds the image in the cache.
  const int output = int(blockIdx.x % unsigned(a.output_tiles)) * S::outputs;
  const Place at(a.tiling, blockIdx.x / unsigned(a.output_tiles));
  const T* x = a.x + at.image * a.g.in_h * a.g.in_w * channels;
  find_inputs(a.g, a.tiling, at, s.in_pixel);
  find_outputs<pixels>(a.g, a.tiling, at, s.out_pixel);
  Filters<T, k, kChunk> filters;
  filters.load(a.depthwise, a.depthwise_bias, 0, channels);
  filters.store(s.filters);
  __syncthreads();  // the pixels' numbers are there

  const auto copy = [&](int chunk) {
    const int buffer = chunk % 2, channel = chunk * kChunk;
    copy_halo<kChunk>(x, s.in_pixel, halo, channel, channels, s.halo + buffer * s.halo_size);
    copy_pointwise(a, output, channel, s.columns + buffer * s.columns_size);
    cp_async_commit();
  };
  const int warp_row = warp / S::warps_across * 32, warp_column = warp % S::warps_across * 64;
  const int columns_left = min(a.columns, a.c_out - output) - warp_column;
  const int chunks = (channels + kChunk - 1) / kChunk;
  float sums[2][8][4] = {};
  copy(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int buffer = chunk % 2;
    const bool more = chunk + 1 < chunks;
    cp_async_wait<0>();
    __syncthreads();  // this chunk has arrived for all; all are done with the one before, whose place the next one
                      // takes
    if (more) copy(chunk + 1);
    depthwise_tile<T, k, stride, pixels>(a, s.halo + buffer * s.halo_size,
                                         s.filters + buffer * Filters<T, k, kChunk>::kFloats, s.rows);
    if (more) filters.load(a.depthwise, a.depthwise_bias, (chunk + 1) * kChunk, channels);
    __syncthreads();  // the left operand is complete
    multiply(s.rows + warp_row * kRow, s.columns + buffer * s.columns_size + warp_column * kRow, columns_left, sums);
    if (more) filters.store(s.filters + (1 - buffer) * Filters<T, k, kChunk>::kFloats);
  }
  __syncthreads();  // the operands are read: the results take their place
  if (columns_left > 0)
    store_outputs(a, a.y + at.image * a.g.out_h * a.g.out_w * a.c_out, output + warp_column, s.out_pixel + warp_row,
                  s.stage + warp * 16 * kStageRow, sums);
}

// Tiles of 128 pixels are for filters whose taps then still find room in registers, where their output channels suffice
// and no image is too small for them.
template <class W>
constexpr bool kHas128 = W::stride == 1 && W::k < 7;

bool takes_128(const Conv2d& g, int64_t c_out) {
  return g.stride_h == 1 && g.kernel_h < 7 && c_out <= Shape<128>::outputs && tiling(g, 128).images == 1;
}

template <int pixels>
int shared_bytes(const Conv2d& g, int64_t c_out) {
  const int columns = int(c_out < Shape<pixels>::outputs ? round_up(int(c_out), 16) : Shape<pixels>::outputs);
  int bytes = 0;
  by_window(g, [&](auto window) {
    bytes = Shared<bf16, decltype(window)::k, pixels>(nullptr, tiling(g, pixels).halo(), columns).bytes;
  });
  return bytes;
}

template <int pixels, class T>
void launch(Arguments<T> a, cudaStream_t stream) {
  a.tiling = tiling(a.g, pixels);
  a.output_tiles = (a.c_out + Shape<pixels>::outputs - 1) / Shape<pixels>::outputs;
  a.columns = a.c_out < Shape<pixels>::outputs ? round_up(a.c_out, 16) : Shape<pixels>::outputs;
  const int bytes = shared_bytes<pixels>(a.g, a.c_out);
  by_window(a.g, [&](auto window) {
    using W = decltype(window);
    if constexpr (pixels == 64 || kHas128<W>) {
      allow_shared(separable_forward<T, W::k, W::stride, pixels>, bytes);
      separable_forward<T, W::k, W::stride, pixels>
          <<<dim3(unsigned(a.tiling.tiles * a.output_tiles)), dim3(kThreads), bytes, stream>>>(a);
    }
  });
}

}  // namespace

bool fused_separable_serves(const Conv2d& g, int64_t c_out, Dtype dtype) {
  if (!serves(g, c_out, dtype)) return false;
  return (takes_128(g, c_out) ? shared_bytes<128>(g, c_out) : shared_bytes<64>(g, c_out)) <= shared_limit();
}

// Counted in bytes an element of the depthwise output: 4 are saved, its writing and reading. Against it stand making it
// again for each further tile of output channels, and the slower product.
bool fused_separable_pays(const Conv2d& g, int64_t c_out) {
  const int64_t again = (c_out - 1) / Shape<64>::outputs;
  const Balance b = balance();
  const double depthwise = double(again * g.kernel_h * g.kernel_w) / b.multiply_adds;
  return depthwise + 2.0 * c_out * kSlowerProduct / b.product <= 4;
}

void fused_separable(const Conv2d& g, int64_t c_out, const void* x, const void* depthwise, const void* pointwise,
                     const void* depthwise_bias, const void* pointwise_bias, Activation inner, Activation activation,
                     void* y, Dtype dtype, cudaStream_t stream) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto as = [](const void* p) { return static_cast<const T*>(p); };
    Arguments<T> a{as(x), as(depthwise), as(pointwise), as(depthwise_bias), as(pointwise_bias), static_cast<T*>(y)};
    a.g = g;
    a.c_out = int(c_out);
    a.inner = inner;
    a.activation = activation;
    takes_128(g, c_out) ? launch<128>(a, stream) : launch<64>(a, stream);
  };
  dtype == Dtype::bf16 ? run(bf16{}) : run(f16{});
}

}  // namespace rkl::cuda
