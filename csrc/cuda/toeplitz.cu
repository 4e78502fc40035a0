// Depthwise convolution with wide filters (up to 33 columns) on the tensor cores: 16 bits, stride 1, either layout.
//
// For one channel and one row kh of its filter, 8 neighbouring outputs are the product of neighbouring inputs with a
// banded matrix that has the filter's row along its diagonals (a Toeplitz matrix):
//   y[row][ox + n] += sum over j of x[row + kh][ox - padding + j] * t[j][n],  t[j][n] = weight[kh][j - n].
// So 16 rows by 8 columns of outputs take one mma per 16 columns of inputs. t is the same at each place of all images:
// it is read from shared memory once a filter row. A column of t has k_blocks * 8 elements, of which kernel_w are taps:
// 31 of 40, 13 of 24. Its zeros meet inputs outside of the output's window; any that is not finite makes it NaN.
//
// A warp makes one channel of a tile of up to 32 rows by 32 columns of outputs; a block has neighbouring channels. The
// tile's inputs lie in shared memory as planes: NHWC images are transposed on the way in, their outputs on the way out.
// Rows above and below an image are not stored: lanes read one row of zeros instead. The tile's even rows are one mma
// and its odd rows another. The inputs that an odd row meets with filter row kh are those that the even row before it
// meets with kh + 1, so that they are read from shared memory once for both. Otherwise reading them would take longer
// than the mmas.
#include <algorithm>

#include "cuda/activation.cuh"
#include "cuda/channel_planes.cuh"
#include "cuda/depthwise.h"
#include "cuda/device.h"

namespace rkl::cuda {
namespace {

constexpr int kTileRows = 32, kTileColumns = 32;
constexpr int kColumnTiles = kTileColumns / 8;  // mmas beside each other
constexpr int kPitch = 64;                      // elements of a row of inputs: eight 16-byte units
constexpr int kLead = 8;                        // zeros before the first filter row

// How the work is cut, and the places of a block's shared memory, in elements.
struct Cut {
  int height, width;  // outputs of a tile in one image: an even number of rows, a multiple of 8 columns
  int images;         // images of a tile: several where maps are small
  int down, across;   // tiles of an image
  int64_t tiles;      // tiles of the whole batch
  int channels;       // channels of a block, each with a warp
  int stored;         // rows of an image in shared memory
  int columns;        // columns of inputs that are read
  int plane, filter;  // elements of one channel
  int left, shift;    // inputs begin `left` columns before the outputs, a multiple of 8; the taps begin `shift` later
  bool vectors;       // NCHW: rows begin at multiples of 16 bytes

  __host__ __device__ int elements() const { return channels * (plane + filter) + kPitch; }  // the row of zeros last
};

// How many columns a tile's inputs begin before its outputs: a multiple of 8 that is not below the padding.
constexpr int left_of(int padding) { return (padding + 7) >> 3 << 3; }

Cut cut(const Conv2d& g, int k_blocks, bool flat) {
  Cut c{};
  c.down = int(ceil_div(g.out_h, kTileRows));
  c.across = int(ceil_div(g.out_w, kTileColumns));
  c.height = int(round_up(ceil_div(g.out_h, c.down), 2));
  c.width = int(round_up(ceil_div(g.out_w, c.across), 8));
  c.images = c.down == 1 ? kTileRows / c.height : 1;
  if (c.images > g.batch) c.images = int(g.batch);
  c.tiles = ceil_div(g.batch, c.images) * c.down * c.across;
  const int window = c.height + g.kernel_h - 1;
  c.stored = g.in_h < window ? int(g.in_h) : window;
  if (c.stored < c.height) c.stored = c.height;  // outputs take the inputs' place
  c.columns = c.width + 8 * (k_blocks - 1);
  c.plane = c.images * c.stored * kPitch;
  c.filter = kLead + g.kernel_h * 8 * k_blocks + 8;
  c.left = left_of(g.padding_w);
  c.shift = c.left - g.padding_w;
  c.vectors = flat && g.in_w % 8 == 0 && g.out_w % 8 == 0;
  return c;
}

// The place of an element in a plane. The order of 16-byte units changes with every second row, so that the eight rows
// that ldmatrix reads at once, every second row, fall into different banks.
__device__ inline int swizzled(int row, int column) { return row * kPitch + ((column ^ row / 2 % 8 * 8)); }

// One tile of one block: its images, and its place in each.
struct Place {
  int64_t image;
  int images, y, x;  // the first output
  int top, bottom;   // rows of the image that are in shared memory

  __device__ Place(const Conv2d& g, const Cut& c, int64_t tile)
      : image(tile / (c.down * c.across) * c.images),
        images(int(min(int64_t(c.images), g.batch - image))),
        y(int(tile / c.across % c.down) * c.height),
        x(int(tile % c.across) * c.width),
        top(max(0, y - g.padding_h)),
        bottom(min(int(g.in_h), y - g.padding_h + c.height + g.kernel_h - 1)) {}
};

// Stores an NHWC tile's outputs: words of two columns are transposed to vectors of 8 channels.
template <class T>
__device__ void store_nhwc(const Conv2d& g, const Cut& c, const Place& at, const T* planes, int c0, void* y) {
  const int vectors = c.channels / 8, pairs = c.width / 2, rows = min(c.height, int(g.out_h) - at.y);
  for (int i = threadIdx.x; i < at.images * rows * pairs * vectors; i += blockDim.x) {
    const int vector = i % vectors, pair = i / vectors % pairs, row = i / vectors / pairs % rows;
    const int image = i / vectors / pairs / rows, channel = c0 + vector * 8, ox = at.x + 2 * pair;
    if (channel >= g.channels) continue;
    const T* from = planes + vector * 8 * c.plane + swizzled(image * c.height + row, 2 * pair);
    Pixel out[2];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      Word word;
      word.bits = *reinterpret_cast<const uint32_t*>(from + e * c.plane);
      out[0].half[e] = word.half[0];
      out[1].half[e] = word.half[1];
    }
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (ox + e < g.out_w)
        *reinterpret_cast<uint4*>(static_cast<T*>(y) +
                                  (((at.image + image) * g.out_h + at.y + row) * g.out_w + ox + e) * g.channels +
                                  channel) = out[e].bits;
  }
}

// A warp stores the outputs of its channel of an NCHW tile.
template <class T>
__device__ void store_nchw(const Conv2d& g, const Cut& c, const Place& at, const T* plane, int64_t channel, void* y) {
  const int lane = threadIdx.x % 32, rows = min(c.height, int(g.out_h) - at.y);
  const int step = c.vectors ? 8 : 1, across = min(c.width, int(g.out_w) - at.x) / step;
  for (int i = lane; i < at.images * rows * across; i += 32) {
    const int column = i % across * step, row = i / across % rows, image = i / across / rows;
    const T* from = plane + swizzled(image * c.height + row, column);
    T* to = static_cast<T*>(y) + (((at.image + image) * g.channels + channel) * g.out_h + at.y + row) * g.out_w + at.x +
            column;
    if (c.vectors)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    else
      *to = *from;
  }
}

// Loads a channel's filter as rows of kRow elements, in the order in which they meet the image.
template <class T, int k_blocks>
__device__ void load_bands(const Convolution& a, bool flipped, const Cut& c, int64_t channel, T* filter) {
  constexpr int kRow = 8 * k_blocks;  // `shift` zeros, the taps, at least 7 zeros
  const int kw = a.g.kernel_w, taps = a.g.kernel_h * kw;
  const T* weight = static_cast<const T*>(a.weight) + channel * taps;
  for (int i = threadIdx.x % 32; i < c.filter; i += 32) {
    const int row = (i - kLead) / kRow, column = (i - kLead) % kRow - c.shift, tap = row * kw + column;
    const bool inside = i >= kLead && row < a.g.kernel_h && column >= 0 && column < kw;
    filter[i] = inside ? weight[flipped ? taps - 1 - tap : tap] : from_float<T>(0.f);
  }
}

// The sums of a warp's tile: sum[0] of its even rows, sum[1] of its odd ones, for each 8 columns.
using Sums = float[2][kColumnTiles][4];

// Adds the products of 16 rows of inputs with one filter row. x[j] has columns 16 j to 16 j + 15.
template <class T, int k_blocks, int pairs>
__device__ inline void multiply_row(const uint32_t (&x)[pairs][4], const uint32_t (&t)[k_blocks], int tiles,
                                    float (&sum)[kColumnTiles][4]) {
  const auto in = [&](int block, int lower) { return x[block / 2][block % 2 * 2 + lower]; };
#pragma unroll
  for (int b = 0; b + 1 < k_blocks; b += 2)
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i)
      if (i < tiles)
        mma_m16n8k16<T>(sum[i], {in(i + b, 0), in(i + b, 1), in(i + b + 1, 0), in(i + b + 1, 1)}, {t[b], t[b + 1]});
  constexpr int last = k_blocks - 1;
#pragma unroll
  for (int i = 0; i < kColumnTiles; ++i)
    if (i < tiles) mma_m16n8k8<T>(sum[i], {in(i + last, 0), in(i + last, 1)}, t[last]);
}

template <class T, int k_blocks>
__device__ inline void multiply(const Conv2d& g, const Cut& c, const Place& at, const T* plane, const T* filter,
                                const T* zeros, Sums& sum) {
  static_assert(k_blocks % 2 == 1, "a k of 8 comes last");
  constexpr int kPairs = (kColumnTiles + k_blocks - 1) / 2;  // pairs of 8-column blocks
  const int lane = threadIdx.x % 32, tiles = c.width / 8;
  // Lanes hold t[j][n] and t[j + 1][n] as one word, where j = 8 block + lane % 4 * 2 and n = lane / 4. In memory they
  // are in one word where n is even, in two where n is odd.
  const int first = kLead + lane % 4 * 2 - lane / 4, half = (first & 1) * 16;
  const uint32_t* band = reinterpret_cast<const uint32_t*>(filter) + (first >> 1);
  // For ldmatrix, lane l addresses even row number l % 16 in block l / 16 of two neighbouring blocks of columns.
  const int m = 2 * (lane % 16), image = m / c.height, unit = lane / 16 * 8;
  const bool used = image < at.images;
  const int y = at.y + m % c.height - g.padding_h, stored = image * c.stored - at.top;
  uint32_t t[k_blocks], t_before[k_blocks];
#pragma unroll
  for (int b = 0; b < k_blocks; ++b) t_before[b] = 0;
#pragma unroll 1
  for (int kh = 0; kh <= g.kernel_h; ++kh, band += 4 * k_blocks) {
    const int iy = y + kh;
    const bool inside = used && iy >= at.top && iy < at.bottom;
    uint32_t x[kPairs][4];
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (16 * j < c.columns)
        ldmatrix_x4(x[j], inside ? plane + swizzled(stored + iy, 16 * j + unit) : zeros + 16 * j + unit);
    if (kh > 0) multiply_row<T>(x, t_before, tiles, sum[1]);
    if (kh == g.kernel_h) break;
#pragma unroll
    for (int b = 0; b < k_blocks; ++b) t[b] = uint32_t((uint64_t(band[4 * b + 1]) << 32 | band[4 * b]) >> half);
    multiply_row<T>(x, t, tiles, sum[0]);
#pragma unroll
    for (int b = 0; b < k_blocks; ++b) t_before[b] = t[b];
  }
}

// The tile's outputs take the inputs' place in shared memory.
template <class T>
__device__ inline void put_back(const Cut& c, const Place& at, const Sums& sum, T* plane) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int odd = 0; odd < 2; ++odd)
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i)
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const int m = 2 * (lower * 8 + lane / 4) + odd;
        if (m >= at.images * c.height || i * 8 >= c.width) continue;
        Vec<T, 2> out;
        out.v[0] = from_float<T>(sum[odd][i][2 * lower]);
        out.v[1] = from_float<T>(sum[odd][i][2 * lower + 1]);
        *reinterpret_cast<Vec<T, 2>*>(plane + swizzled(m, i * 8 + lane % 4 * 2)) = out;
      }
}

constexpr int most_channels(bool nhwc) { return nhwc ? 16 : 8; }  // NHWC: 32 bytes, the least that memory moves

template <class T, int k_blocks, bool nhwc>
__global__ void __launch_bounds__(32 * most_channels(nhwc), nhwc ? 1 : 2)
    convolve_toeplitz(Convolution a, bool flipped, Cut c, int channel_blocks) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Conv2d& g = a.g;
  const int warp = threadIdx.x / 32, c0 = int(blockIdx.x % channel_blocks) * c.channels;
  const int channel = c0 + warp;
  const bool live = channel < g.channels;
  T* planes = reinterpret_cast<T*>(memory);
  T *plane = planes + warp * c.plane, *filter = planes + c.channels * c.plane + warp * c.filter;
  T* zeros = planes + c.channels * (c.plane + c.filter);
  if (live) load_bands<T, k_blocks>(a, flipped, c, channel, filter);
  for (int i = threadIdx.x; i < kPitch; i += blockDim.x) zeros[i] = from_float<T>(0.f);
  const float bias = live && a.bias ? to_float(static_cast<const T*>(a.bias)[channel]) : 0.f;

  for (int64_t tile = blockIdx.x / channel_blocks; tile < c.tiles; tile += gridDim.x / channel_blocks) {
    const Place at(g, c, tile);
    const Window<T> inputs{
        static_cast<const T*>(a.x), g.channels,    g.in_h,    g.in_w,     at.image, at.images, at.top,
        at.bottom - at.top,         at.x - c.left, c.columns, int(g.in_w)};
    const auto place = [&](int image, int row, int column) { return swizzled(image * c.stored + row, column); };
    if (nhwc)
      inputs.load_nhwc(c0, c.channels, planes, c.plane, place);
    else if (live)
      inputs.load_nchw(channel, c.vectors, plane, place);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (live) {
      Sums sum;
#pragma unroll
      for (int i = 0; i < 8 * kColumnTiles; ++i) sum[i / 16][i / 4 % 4][i % 4] = bias;
      multiply<T, k_blocks>(g, c, at, plane, filter, zeros, sum);
      with_activation<T>(a.act, [&](auto activation) {
#pragma unroll
        for (int i = 0; i < 8 * kColumnTiles; ++i)
          sum[i / 16][i / 4 % 4][i % 4] = activation(sum[i / 16][i / 4 % 4][i % 4]);
      });
      __syncwarp();  // all lanes have read the inputs
      put_back(c, at, sum, plane);
    }
    __syncthreads();
    if (nhwc)
      store_nhwc(g, c, at, planes, c0, a.y);
    else if (live)
      store_nchw(g, c, at, plane, channel, a.y);
    __syncthreads();  // before the next inputs come
  }
}

// How many blocks of 8 rows t has: for the taps, for the zeros before them, and one row for each of the 8 columns but
// the first. 0 where the family does not serve the convolution.
int k_blocks_of(const Conv2d& g, Dtype dtype) {
  constexpr int kTallest = 4096;  // such a filter exceeds all shared memory; 32 bits cannot count far taller ones
  if (!is_wide(g, dtype) || g.kernel_h > kTallest) return 0;
  const int rows = g.kernel_w + left_of(g.padding_w) - g.padding_w + 7;
  return rows <= 24 ? 3 : rows <= 40 ? 5 : 0;
}

Conv2d convolution_of(Result result, const Conv2d& g) {
  return result == Result::output ? g : data_grad_as_convolution(g);
}

template <class T, int k_blocks, bool nhwc>
void launch(const Convolution& a, bool flipped, const Cut& c, const Plan& plan, cudaStream_t stream) {
  allow_shared(reinterpret_cast<const void*>(&convolve_toeplitz<T, k_blocks, nhwc>), plan.shared);
  convolve_toeplitz<T, k_blocks, nhwc>
      <<<grid("convolve_toeplitz", plan.blocks), dim3(plan.threads), plan.shared, stream>>>(
          a, flipped, c, int(ceil_div(a.g.channels, c.channels)));
  check_launch("convolve_toeplitz");
}

}  // namespace

// Plan::kernel is k_blocks. A block has 32 threads, a warp, for each channel.
MaybePlan plan_toeplitz(Result result, const Conv2d& g, Dtype dtype, bool aligned, const Device& device) {
  if (result == Result::filter_grad) return plan_toeplitz_filter_grad(g, dtype, aligned, device);
  if (result == Result::both_grads || (g.nhwc && !aligned)) return std::nullopt;
  const Conv2d f = convolution_of(result, g);
  Plan plan{Family::toeplitz};
  plan.kernel = k_blocks_of(f, dtype);
  if (!plan.kernel) return std::nullopt;
  Cut c = cut(f, plan.kernel, false);
  const auto bytes = [&] { return c.elements() * 2; };
  // Half of the channels where all do not fit. NHWC then uses only half of each 32 bytes moved; caches keep the rest.
  for (c.channels = most_channels(g.nhwc); bytes() > device.block_shared; c.channels /= 2)
    if (c.channels == 8) return std::nullopt;
  plan.rows = c.height;
  plan.threads = 32 * c.channels;
  plan.shared = bytes();
  const int64_t channel_blocks = ceil_div(g.channels, c.channels);
  // A block goes through many tiles with its filters, but there must be blocks for the whole GPU.
  constexpr int64_t kBlocksEach = 8;
  plan.blocks = channel_blocks * std::min(ceil_div(kBlocksEach * device.multiprocessors, channel_blocks), c.tiles);
  return plan;
}

void launch_toeplitz(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  Convolution b = a;
  b.g = convolution_of(result, a.g);
  const bool flipped = result == Result::data_grad;
  const bool aligned = aligned_16(a.x, a.y);
  Cut c = cut(b.g, plan.kernel, !a.g.nhwc && aligned);
  c.channels = plan.threads / 32;
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (plan.kernel == 3)
        a.g.nhwc ? launch<T, 3, true>(b, flipped, c, plan, stream) : launch<T, 3, false>(b, flipped, c, plan, stream);
      else
        a.g.nhwc ? launch<T, 5, true>(b, flipped, c, plan, stream) : launch<T, 5, false>(b, flipped, c, plan, stream);
    }
  });
}

}  // namespace rkl::cuda
