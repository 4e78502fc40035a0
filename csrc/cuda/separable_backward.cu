// The first half of the separable convolution's backward, in one kernel: from the output's gradient and x come the
// pointwise filters' gradient, its bias's, and the gradient of the depthwise output, which the depthwise backward then
// takes. The depthwise output itself is made again here in shared memory and never stored.
//
// A block owns a chunk of 64 channels and a slice of the tiles of pixels. Per tile, with dz = grad * act'(y) as rows of
// pixels by output channels and D the depthwise output as rows of pixels by channels:
//   d_pointwise += dz^T D   stays in registers over all tiles of the slice
//   dD = (dz pointwise) * inner'(D)   goes to memory
// Both products' operands are in shared memory once; the next tile's copies are under way during the products. The
// slices' sums go to a workspace, and a second kernel adds them in the order of the slices: the same bits every time.
// Chunks of one slice read the same gradients at the same time, so that all but the first find them in the cache.
#include "cuda/separable.cuh"

namespace rkl::cuda {
namespace {

using namespace separable;

constexpr int kTile = 64, kChunk = 64, kRow = kPitch<kChunk>;
constexpr int kMaxOutputs = 256;  // sums of 256 output channels by 64 channels: 64 registers a thread
constexpr int kStrip = 4;

template <class T>
struct Arguments {
  const T *grad, *y, *x, *depthwise, *pointwise, *depthwise_bias;
  T* d_inner;      // may be null: not wanted
  float* partial;  // sums of the filters' and the bias's gradient, a slice after the other; may be null
  Conv2d g;
  Tiling tiling;
  int c_out, chunks, slices;
  Activation inner, activation;

  __host__ __device__ int columns() const { return (c_out + 15) / 16 * 16; }  // of dz: zeros after c_out
  __host__ __device__ int64_t sums() const { return (g.channels + 1) * c_out; }
};

// The block's shared memory.
template <class T, int k>
struct Shared {
  T *halo, *middle, *pointwise, *dz, *raw_grad, *raw_y;
  float* filters;
  int *in_pixel, *out_pixel;
  int dz_row, bytes;

  __host__ __device__ Shared(unsigned char* base, const Arguments<T>& a) {
    dz_row = kPitch<0> + a.columns();
    filters = reinterpret_cast<float*>(base);
    middle = reinterpret_cast<T*>(filters + Filters<T, k, kChunk>::kFloats);
    pointwise = middle + kTile * kRow;
    dz = pointwise + a.columns() * kRow;
    raw_grad = dz + kTile * dz_row;
    raw_y = raw_grad + kTile * dz_row;
    halo = raw_y + (a.activation == Activation::none ? 0 : kTile * dz_row);
    in_pixel = reinterpret_cast<int*>(halo + a.tiling.halo() * kRow);
    out_pixel = in_pixel + a.tiling.halo();
    bytes = int(reinterpret_cast<unsigned char*>(out_pixel + 2 * kTile) - base);
  }
};

// The chunk's part of the pointwise filters, a row an output channel.
template <class T>
__device__ inline void copy_pointwise(const Arguments<T>& a, int channel, T* shared) {
  constexpr int vectors = kChunk / 8;
  const int channels = int(a.g.channels);
#pragma unroll 1
  for (int v = threadIdx.x; v < a.columns() * vectors; v += kThreads) {
    const int o = v / vectors, c = channel + v % vectors * 8;
    const bool inside = o < a.c_out && c < channels;
    cp_async_16(shared + o * kRow + v % vectors * 8, inside ? a.pointwise + int64_t(o) * channels + c : a.pointwise,
                inside ? 16 : 0);
  }
}

// A tile's rows of all output channels: four threads a pixel. make_dz relies on this distribution.
template <class T>
__device__ inline void copy_rows(const T* rows, const int* pixel, int c_out, int columns, int row, T* shared) {
  const int m = threadIdx.x / 4, p = pixel[m];
#pragma unroll 1
  for (int c = threadIdx.x % 4 * 8; c < columns; c += 32) {
    const bool inside = p >= 0 && c < c_out;
    cp_async_16(shared + m * row + c, inside ? rows + int64_t(p) * c_out + c : rows, inside ? 16 : 0);
  }
}

// dz = grad * act'(y), in 16 bits. A thread takes the elements that it copied itself, so that waiting for its own
// copies is enough, and so that the copies of the next tile may begin once the operands, rather than these, are all
// read.
template <class T, int k>
__device__ inline void make_dz(const Arguments<T>& a, const Shared<T, k>& s) {
  const int m = threadIdx.x / 4;
#pragma unroll 1
  for (int c = threadIdx.x % 4 * 8; c < a.columns(); c += 32) {
    const int at = m * s.dz_row + c;
    Vec<T> dz = *reinterpret_cast<const Vec<T>*>(s.raw_grad + at);
    if (a.activation != Activation::none) {
      const Vec<T> y = *reinterpret_cast<const Vec<T>*>(s.raw_y + at);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        dz.v[i] = from_float<T>(to_float(dz.v[i]) * slope_from_output(a.activation, to_float(y.v[i])));
    }
    *reinterpret_cast<Vec<T>*>(s.dz + at) = dz;
  }
}

// The depthwise output of the tile, activated: zeros where there is no pixel. A warp reads 32 pairs of channels of one
// pixel at a time: all banks.
template <class T, int k, int stride>
__device__ inline void make_middle(const Arguments<T>& a, const Shared<T, k>& s, const int* pixel) {
  constexpr int pairs = kChunk / 2;
  const int channel = threadIdx.x % pairs * 2;
#pragma unroll 1
  for (int m = threadIdx.x / pairs * kStrip; m < kTile; m += kThreads / pairs * kStrip) {
    float sum[kStrip * 2];
    depthwise_strip<T, k, stride, kChunk, kStrip>(s.halo + halo_pixel<stride>(a.tiling, m) * kRow + channel,
                                                  a.tiling.halo_width, s.filters + channel, sum);
    activate_all<T>(a.inner, sum);
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const bool inside = pixel[m + i] >= 0;
      *reinterpret_cast<Vec<T, 2>*>(s.middle + (m + i) * kRow + channel) = {
          from_float<T>(inside ? sum[i * 2] : 0.f), from_float<T>(inside ? sum[i * 2 + 1] : 0.f)};
    }
  }
}

// d_pointwise += dz^T D. Of the output channels, a warp has every fourth group of 16, so that few of them still busy
// all warps; of the channels, 32.
template <class T, int k>
__device__ inline void add_pointwise_grad(const Arguments<T>& a, const Shared<T, k>& s, float (&sums)[4][4][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = warp / 4 * 32;
#pragma unroll 1
  for (int m = 0; m < kTile; m += 16) {
    uint32_t b[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j)
      ldmatrix_x4<true>(b[j], s.middle + (m + lane % 16) * kRow + column + j * 16 + lane / 16 * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int o = (i * 4 + warp % 4) * 16;
      if (o >= a.c_out) continue;  // the whole warp
      uint32_t row[4];
      ldmatrix_x4<true>(row, s.dz + (m + lane / 16 * 8 + lane % 8) * s.dz_row + o + lane / 8 % 2 * 8);
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(sums[i][j], row, {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
    }
  }
}

// dD before the inner activation's slope: dz times the chunk's pointwise filters; a warp has 16 pixels by 32 channels.
template <class T, int k>
__device__ inline void make_inner_grad(const Arguments<T>& a, const Shared<T, k>& s, float (&sums)[4][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m = warp % 4 * 16, column = warp / 4 * 32;
#pragma unroll 1
  for (int o = 0; o < a.c_out; o += 16) {
    uint32_t row[4], b[2][4];
    ldmatrix_x4(row, s.dz + (m + lane % 16) * s.dz_row + o + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < 2; ++j)
      ldmatrix_x4<true>(b[j], s.pointwise + (o + lane % 16) * kRow + column + j * 16 + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(sums[j], row, {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
  }
}

// Times the inner activation's slope, and to memory: through the place of D, of which a warp reads and writes its own
// part only, to have 16 bytes a store.
template <class T>
__device__ inline void store_inner_grad(const Arguments<T>& a, T* d_inner, int channel, T* middle, const int* pixel,
                                        const float (&sums)[4][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m = warp % 4 * 16, column = warp / 4 * 32;
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      auto* at = reinterpret_cast<Vec<T, 2>*>(middle + (m + lane / 4 + i * 4) * kRow + column + j * 8 + lane % 4 * 2);
      const Vec<T, 2> d = *at;
      *at = {from_float<T>(sums[j][i] * slope_from_output(a.inner, to_float(d.v[0]))),
             from_float<T>(sums[j][i + 1] * slope_from_output(a.inner, to_float(d.v[1])))};
    }
  __syncwarp();
#pragma unroll
  for (int v = lane; v < 64; v += 32) {
    const int row = m + v / 4, c = column + v % 4 * 8, p = pixel[row];
    if (p >= 0 && channel + c < a.g.channels)
      *reinterpret_cast<Vec<T>*>(d_inner + p * a.g.channels + channel + c) =
          *reinterpret_cast<const Vec<T>*>(middle + row * kRow + c);
  }
}

template <class T>
__device__ inline void store_sums(const Arguments<T>& a, int channel, float* partial, const float (&sums)[4][4][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int o = (i * 4 + warp % 4) * 16 + lane / 4 + e * 4, c = channel + warp / 4 * 32 + j * 8 + lane % 4 * 2;
        if (o < a.c_out && c < a.g.channels)
          *reinterpret_cast<Vec<float, 2>*>(partial + o * a.g.channels + c) = {sums[i][j][e], sums[i][j][e + 1]};
      }
}

template <class T, int k, int stride>
__global__ void __launch_bounds__(kThreads, 1) separable_backward(const Arguments<T> a) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Shared<T, k> s(shared, a);
  const int channels = int(a.g.channels), channel = int(blockIdx.x) % a.chunks * kChunk;
  const int slice = int(blockIdx.x) / a.chunks;
  const auto find = [&](int64_t tile, int buffer) {
    const Place at(a.tiling, tile);
    find_inputs(a.g, a.tiling, at, s.in_pixel);
    find_outputs<kTile>(a.g, a.tiling, at, s.out_pixel + buffer * kTile);
  };
  const auto copy = [&](int64_t tile, int buffer) {
    const Place at(a.tiling, tile);
    const int64_t before = at.image * a.g.out_h * a.g.out_w * a.c_out;
    const int* pixel = s.out_pixel + buffer * kTile;
    copy_halo<kChunk>(a.x + at.image * a.g.in_h * a.g.in_w * channels, s.in_pixel, a.tiling.halo(), channel, channels,
                      s.halo);
    copy_rows(a.grad + before, pixel, a.c_out, a.columns(), s.dz_row, s.raw_grad);
    if (a.activation != Activation::none) copy_rows(a.y + before, pixel, a.c_out, a.columns(), s.dz_row, s.raw_y);
    cp_async_commit();
  };

  Filters<T, k, kChunk> filters;
  filters.load(a.depthwise, a.depthwise_bias, channel, channels);
  filters.store(s.filters);
  copy_pointwise(a, channel, s.pointwise);
  find(slice, 0);
  __syncthreads();  // the pixels' numbers are there
  copy(slice, 0);
  float filter_sums[4][4][4] = {}, bias_sum = 0.f;
  int buffer = 0;
  for (int64_t tile = slice; tile < a.tiling.tiles; tile += a.slices, buffer = 1 - buffer) {
    const int* pixel = s.out_pixel + buffer * kTile;
    const bool more = tile + a.slices < a.tiling.tiles;
    cp_async_wait<0>();
    __syncthreads();  // this tile has arrived for all; all are done with the operands of the one before
    make_dz(a, s);
    make_middle<T, k, stride>(a, s, pixel);
    if (more) find(tile + a.slices, 1 - buffer);
    __syncthreads();  // the operands are complete, and what they were made of is free for the next tile
    if (more) copy(tile + a.slices, 1 - buffer);
    if (a.partial) {
      add_pointwise_grad(a, s, filter_sums);
      if (channel == 0 && threadIdx.x < a.c_out)
        for (int m = 0; m < kTile; ++m) bias_sum += to_float(s.dz[m * s.dz_row + threadIdx.x]);
    }
    float inner_sums[4][4] = {};
    if (a.d_inner) make_inner_grad(a, s, inner_sums);
    __syncthreads();  // D is read: its gradient takes its place
    if (a.d_inner)
      store_inner_grad(a, a.d_inner + Place(a.tiling, tile).image * a.g.out_h * a.g.out_w * channels, channel, s.middle,
                       pixel, inner_sums);
  }
  if (!a.partial) return;
  float* partial = a.partial + slice * a.sums();
  store_sums(a, channel, partial, filter_sums);
  if (channel == 0 && threadIdx.x < a.c_out) partial[int64_t(a.c_out) * channels + threadIdx.x] = bias_sum;
}

// Adds the slices' sums, always in the same order; the filters' gradient first, the bias's after it.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_slices(const float* partial, int slices, int64_t filters, int64_t all, T* d_pointwise, T* d_bias) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= all) return;
  float sum = 0.f;
#pragma unroll 8
  for (int s = 0; s < slices; ++s) sum += partial[s * all + i];
  if (i < filters) {
    if (d_pointwise) d_pointwise[i] = from_float<T>(sum);
  } else if (d_bias) {
    d_bias[i - filters] = from_float<T>(sum);
  }
}

template <class T>
Arguments<T> arguments(const Conv2d& g, int64_t c_out, Activation inner, Activation activation) {
  Arguments<T> a{};
  a.g = g;
  a.tiling = tiling(g, kTile);
  a.c_out = int(c_out);
  a.chunks = int((g.channels + kChunk - 1) / kChunk);
  a.inner = inner;
  a.activation = activation;
  // One block fills a processor's registers; all blocks at once, so that none begins late.
  const int64_t slices = (device_attribute(cudaDevAttrMultiProcessorCount) + a.chunks - 1) / a.chunks;
  a.slices = int(slices < a.tiling.tiles ? slices : a.tiling.tiles);
  return a;
}

template <class T>
int shared_bytes(const Arguments<T>& a) {
  int bytes = 0;
  by_window(a.g, [&](auto window) { bytes = Shared<T, decltype(window)::k>(nullptr, a).bytes; });
  return bytes;
}

}  // namespace

bool fused_separable_backward_serves(const Conv2d& g, int64_t c_out, Activation inner, Activation activation,
                                     Dtype dtype) {
  // The inner slope is told from the 16-bit D in shared memory, so it must be one that its output tells.
  return serves(g, c_out, dtype) && c_out <= kMaxOutputs && inner != Activation::silu && inner != Activation::gelu &&
         shared_bytes(arguments<bf16>(g, c_out, inner, activation)) <= shared_limit();
}

// Counted in bytes an element of the depthwise output. Saved are its writing and reading and, a gradient's element, one
// of two readings and, with an activation, the writing and reading of dz. Against it stand the slower products, and
// reading grad and y again for each further chunk of channels, from the cache: a third of memory's price.
bool fused_separable_backward_pays(const Conv2d& g, int64_t c_out, Activation activation) {
  const bool activated = activation != Activation::none;
  const double outputs = double(c_out) / double(g.channels), again = double((g.channels - 1) / kChunk);
  const double saved = 4 + outputs * (activated ? 6 : 2), cached = again * outputs * (activated ? 4 : 2) / 3;
  return cached + 4.0 * c_out * kSlowerProduct / balance().product <= saved;
}

int64_t fused_separable_backward_workspace(const Conv2d& g, int64_t c_out) {
  const auto a = arguments<bf16>(g, c_out, Activation::none, Activation::none);
  return a.slices * a.sums();
}

void fused_separable_backward(const Conv2d& g, int64_t c_out, const void* grad, const void* y, const void* x,
                              const void* depthwise, const void* pointwise, const void* depthwise_bias,
                              Activation inner, Activation activation, void* d_inner, void* d_pointwise,
                              void* d_pointwise_bias, float* workspace, Dtype dtype, cudaStream_t stream) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto as = [](const void* p) { return static_cast<const T*>(p); };
    Arguments<T> a = arguments<T>(g, c_out, inner, activation);
    a.grad = as(grad);
    a.y = as(y);
    a.x = as(x);
    a.depthwise = as(depthwise);
    a.pointwise = as(pointwise);
    a.depthwise_bias = as(depthwise_bias);
    a.d_inner = static_cast<T*>(d_inner);
    a.partial = d_pointwise || d_pointwise_bias ? workspace : nullptr;
    const int bytes = shared_bytes(a);
    by_window(g, [&](auto window) {
      using W = decltype(window);
      allow_shared(separable_backward<T, W::k, W::stride>, bytes);
      separable_backward<T, W::k, W::stride><<<dim3(a.chunks * a.slices), dim3(kThreads), bytes, stream>>>(a);
    });
    if (!a.partial) return;
    const int64_t blocks = (a.sums() + kThreads - 1) / kThreads;
    add_slices<T><<<dim3(unsigned(blocks)), dim3(kThreads), 0, stream>>>(a.partial, a.slices, c_out * g.channels,
                                                                         a.sums(), static_cast<T*>(d_pointwise),
                                                                         static_cast<T*>(d_pointwise_bias));
  };
  dtype == Dtype::bf16 ? run(bf16{}) : run(f16{});
}

}  // namespace rkl::cuda
