// The gradient of wide filters (9 columns and more) on the tensor cores: 16 bits, stride 1, either layout.
//
// For one channel and one row oy of the output's gradient, the gradients of all taps are the product of a banded matrix
// that has the gradient's row along its diagonals (a Toeplitz matrix) with rows of the image:
//   dw[kh][kw] += sum over ix of t[kw][ix] * x[oy + kh - padding][ix],  t[kw][ix] = grad[oy][ix - kw + padding].
// So 16 filter columns by 8 filter rows take one mma for each 16 columns of the image. Columns outside of the image,
// and blocks of t without any gradient, are not multiplied. The zeros of t beyond a row's ends meet inputs that the tap
// does not read; if one is not finite, the tap's gradient is NaN.
//
// A warp has a channel and keeps its sums in registers through all tiles of its part of the batch. The filter's even
// rows are one mma and its odd rows another. The image rows that even filter rows meet with one row of the gradient are
// those that odd filter rows meet with the row before it, so that they are read from shared memory once for both. A
// filter with more taps than a warp has sums is cut into pieces, each with blocks of its own.
#include <algorithm>

#include "cuda/channel_planes.cuh"
#include "cuda/depthwise.h"
#include "cuda/device.h"

namespace rkl::cuda {
namespace {

constexpr int kTileRows = 32, kTileColumns = 32;     // of a tile of the gradient, at most
constexpr int kStep = 32, kMostColumns = 2 * kStep;  // image columns: of a step; the most that a tile meets
constexpr int kGap = 16;  // zeros between rows of the gradient: bands that overlap a row reach no further

// One of the kernels: the piece of the filter whose sums a warp keeps, a block's channels, and how many blocks the
// registers of a multiprocessor suffice for.
template <class Element, int column_tiles, int row_tiles, bool is_nhwc>
struct Variant {
  using T = Element;
  static constexpr int kColumnTiles = column_tiles, kRowTiles = row_tiles;  // of 16 columns, of 8 even and 8 odd rows
  static constexpr int kColumns = 16 * column_tiles, kRows = 16 * row_tiles;
  static constexpr bool nhwc = is_nhwc;
  static constexpr int kMostChannels = nhwc ? 16 : 8;  // NHWC: 32 bytes, the least that memory moves
  static constexpr int kBlocks = (column_tiles == 1 ? 2 : 1) * (nhwc ? 1 : 2);
  using Sums = float[2][row_tiles][column_tiles][4];  // of even and odd rows
};

// The image columns that a tile of the gradient meets with a piece of the filter. columns: how many are multiplied.
struct Span {
  int left, right, columns;

  __host__ __device__ Span(const Conv2d& g, int x, int width, int first, int taps, int align) {
    const int from = x - g.padding_w + first, end = x + width - 1 - g.padding_w + first + taps;
    left = from > 0 ? from / align * align : 0;
    right = end < g.in_w ? end : int(g.in_w);
    columns = right > left ? (right - left + kStep - 1) / kStep * kStep : 0;
  }
};

// How the work is cut, and the places of a block's shared memory, in elements.
struct Cut {
  int height, width;        // rows and columns of a tile of the gradient in one image
  int images;               // images of a tile: several where maps are small
  int down, across;         // tiles of an image
  int64_t tiles;            // tiles of the whole batch
  int pieces_down, pieces;  // pieces of the filter: below each other, in all
  int channels;             // channels of a block, each with a warp
  int group;                // an image's even rows lie apart from its odd rows: how many there are of each
  int rows_alike;           // 1 where two rows fill the banks once and have their units in the same order, else 0
  int pitch, grad_pitch;    // elements of a row of the image and of the gradient
  int plane, gradient;      // elements of one channel
  int align;                // 8 where rows begin at multiples of 16 bytes, for NCHW's vectors

  __host__ __device__ int elements() const { return channels * (plane + gradient) + kStep; }  // zeros last
};

template <class V>
Cut cut(const Conv2d& g, bool flat) {
  Cut c{};
  c.align = flat && !g.nhwc && g.in_w % 8 == 0 && g.out_w % 8 == 0 ? 8 : 1;
  c.pieces_down = int(ceil_div(g.kernel_h, V::kRows));
  c.pieces = c.pieces_down * int(ceil_div(g.kernel_w, V::kColumns));
  // Tiles are as wide as fits; 8 columns always fit. Each turn visits all tiles, so it must narrow them: if it only
  // added one more tile, the tiles of a long row would stay as wide for thousands of turns.
  int most = kMostColumns + 1;
  for (int64_t width = kTileColumns; most > kMostColumns; width = c.width - 8) {
    c.width = int(round_up(ceil_div(g.out_w, ceil_div(g.out_w, width)), 8));
    most = 0;
    for (int x = 0; x < g.out_w; x += c.width)
      for (int first = 0; first < g.kernel_w; first += V::kColumns) {
        const Span span(g, x, c.width, first, V::kColumns, c.align);  // the widest of the piece
        if (span.columns > most) most = span.columns;
      }
  }
  c.across = int(ceil_div(g.out_w, c.width));
  c.down = int(ceil_div(g.out_h, kTileRows));
  c.height = int(ceil_div(g.out_h, c.down));
  const int window = c.height + (g.kernel_h < V::kRows ? g.kernel_h : V::kRows) - 1;
  const int stored = g.in_h < window ? int(g.in_h) : window;
  c.images = c.down == 1 ? kTileRows / c.height : 1;
  while (c.images > 1 && (c.images > g.batch || c.images * stored > 2 * kTileRows)) --c.images;
  c.tiles = ceil_div(g.batch, c.images) * c.down * c.across;
  c.group = int(ceil_div(stored, 2));
  c.pitch = most;
  c.rows_alike = most == kStep;
  c.grad_pitch = c.width + kGap;
  c.plane = c.images * 2 * c.group * c.pitch;
  c.gradient = kGap + c.images * c.height * c.grad_pitch;
  return c;
}

// The place of an element in a plane. The 16-byte units of neighbouring rows are in different orders, so that the eight
// rows that ldmatrix reads at once fall into different banks.
__device__ inline int swizzled(const Cut& c, int row, int column) {
  return row * c.pitch + (column ^ (row >> c.rows_alike & (c.pitch / 8 - 1)) * 8);
}

// One tile, and the part of the image that it meets with the block's piece of the filter, whose first tap is (kh, kw).
struct Place {
  int64_t image;
  int images, y, x;  // the first gradient
  int rows, width;   // rows and columns of the gradient
  int taps_down;     // rows of the piece
  int top, bottom;   // rows of the image
  Span span;
  int row, band;  // from top on, the image row that kh and row y meet; from x on, the gradient that left and kw meet

  template <class V>
  __device__ Place(V, const Conv2d& g, const Cut& c, int64_t tile, int kh, int kw)
      : image(tile / (c.down * c.across) * c.images),
        images(int(min(int64_t(c.images), g.batch - image))),
        y(int(tile / c.across % c.down) * c.height),
        x(int(tile % c.across) * c.width),
        rows(min(c.height, int(g.out_h) - y)),
        width(min(c.width, int(g.out_w) - x)),
        taps_down(min(V::kRows, g.kernel_h - kh)),
        top(max(0, y - g.padding_h + kh)),
        bottom(max(top, min(int(g.in_h), y - g.padding_h + kh + rows + taps_down - 1))),
        span(g, x, width, kw, min(V::kColumns, g.kernel_w - kw), c.align),
        row(y - g.padding_h + kh - top),
        band(span.left - x + g.padding_w - kw) {}
};

// Starts the copies of a tile; the caller waits.
template <class V, class T = typename V::T>
__device__ inline void load(const FilterGrad& a, const Cut& c, const Place& at, int c0, T* planes, T* gradients) {
  const Conv2d& g = a.g;
  const Window<T> x{
      static_cast<const T*>(a.x), g.channels,   g.in_h,          g.in_w,       at.image, at.images, at.top,
      at.bottom - at.top,         at.span.left, at.span.columns, at.span.right};
  const Window<T> grad{static_cast<const T*>(a.grad),
                       g.channels,
                       g.out_h,
                       g.out_w,
                       at.image,
                       at.images,
                       at.y,
                       at.rows,
                       at.x,
                       c.width,
                       int(g.out_w)};
  const auto place = [&](int image, int row, int column) {
    return swizzled(c, (image * 2 + row % 2) * c.group + row / 2, column);
  };
  const auto grad_place = [&](int image, int row, int column) {
    return kGap + (image * c.height + row) * c.grad_pitch + column;
  };
  const int warp = threadIdx.x / 32;
  if (V::nhwc) {
    x.load_nhwc(c0, c.channels, planes, c.plane, place);
    grad.load_nhwc(c0, c.channels, gradients, c.gradient, grad_place);
  } else if (c0 + warp < g.channels) {
    x.load_nchw(c0 + warp, c.align == 8, planes + warp * c.plane, place);
    grad.load_nchw(c0 + warp, c.align == 8, gradients + warp * c.gradient, grad_place);
  }
  cp_async_commit();
}

// Adds one image's products over kStep of its columns, from `column` on. With more columns at a time, more bands would
// have to be in registers.
template <class V, class T = typename V::T>
__device__ inline void multiply(const Cut& c, const Place& at, int image, int column, const T* plane, const T* gradient,
                                const T* zeros, typename V::Sums& sum) {
  // A band stands for all 8 x 8 blocks of t on one diagonal, which are equal: 8 image columns by 8 filter columns.
  constexpr int kBefore = 2 * V::kColumnTiles - 1, kBands = kBefore + kStep / 8;
  const int lane = threadIdx.x % 32, stored = at.bottom - at.top, diagonal = at.band + column;
  // Lanes hold t[kw][ix] and t[kw][ix + 1] as one word, where ix = lane % 4 * 2 and kw = lane / 4 of the block. In
  // memory they may lie in two words.
  const int first = diagonal + lane % 4 * 2 - lane / 4, half = (first & 1) * 16;
  const uint32_t* words =
      reinterpret_cast<const uint32_t*>(gradient + kGap + image * c.height * c.grad_pitch) + (first >> 1);
  unsigned filled = 0;  // bits of the bands that have some of the gradient
#pragma unroll
  for (int b = 0; b < kBands; ++b) {
    const int begin = diagonal + 8 * (b - kBefore);
    if (begin - 7 < at.width && begin + 7 >= 0) filled |= 1u << b;
  }
  // For ldmatrix, lane l addresses row l % 8 of an mma in block l / 8 of four neighbouring blocks of columns.
  const int lane_row = at.row + lane % 8 * 2, unit = column + lane / 8 * 8;
  uint32_t t[2][kBands] = {};
#pragma unroll 1
  for (int r = 0; r <= at.rows; r += 2) {
#pragma unroll
    for (int q = 0; q < 2; ++q, words += c.grad_pitch / 2) {
      if (r + q < at.rows) {
#pragma unroll
        for (int b = 0; b < kBands; ++b) {
          const uint32_t* word = words + 4 * (b - kBefore);
          if (filled >> b & 1) t[q][b] = uint32_t((uint64_t(word[1]) << 32 | word[0]) >> half);
        }
      }
#pragma unroll
      for (int h = 0; h < V::kRowTiles; ++h) {
        if (16 * h >= at.taps_down) break;
        const unsigned row = lane_row + r + q + 16 * h;
        uint32_t x[4];
        ldmatrix_x4(x, row < unsigned(stored) ? plane + swizzled(c, (image * 2 + row % 2) * c.group + row / 2, unit)
                                              : zeros + lane / 8 * 8);
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {  // with the gradient's row r + q - odd
          if (unsigned(r + q - odd) >= unsigned(at.rows)) continue;
          const uint32_t (&band)[kBands] = t[q ^ odd];
#pragma unroll
          for (int p = 0; p < 2; ++p)
#pragma unroll
            for (int m = 0; m < V::kColumnTiles; ++m) {
              const int b = kBefore + 2 * (p - m);
              if (filled >> (b - 1) & 7)
                mma_m16n8k16<T>(sum[odd][h][m], {band[b], band[b - 1], band[b + 1], band[b]}, {x[2 * p], x[2 * p + 1]});
            }
        }
      }
    }
  }
}

// The sum of a lane's share of the gradient.
template <class T>
__device__ inline float sum_of(const Cut& c, const Place& at, const T* gradient) {
  float sum = 0.f;
  const int pair = threadIdx.x % 16 * 2;
  if (pair >= c.width) return 0.f;
  for (int row = threadIdx.x / 16 % 2; row < at.images * at.rows; row += 2) {
    const Vec<T, 2> v = *reinterpret_cast<const Vec<T, 2>*>(
        gradient + (row / at.rows * c.height + row % at.rows) * c.grad_pitch + pair);
    sum += to_float(v.v[0]) + to_float(v.v[1]);
  }
  return sum;
}

template <class V>
__device__ inline void write_sums(const FilterGrad& a, int part, int64_t channel, int kh0, int kw0,
                                  const typename V::Sums& sum) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int odd = 0; odd < 2; ++odd)
#pragma unroll
    for (int h = 0; h < V::kRowTiles; ++h)
#pragma unroll
      for (int m = 0; m < V::kColumnTiles; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int kh = kh0 + 16 * h + (lane % 4 * 2 + e % 2) * 2 + odd, kw = kw0 + 16 * m + e / 2 * 8 + lane / 4;
          if (kh < a.g.kernel_h && kw < a.g.kernel_w) a.sum(part, kh * a.g.kernel_w + kw, channel) = sum[odd][h][m][e];
        }
}

template <class T, int column_tiles, int row_tiles, bool nhwc>
__global__ void __launch_bounds__(32 * (nhwc ? 16 : 8), Variant<T, column_tiles, row_tiles, nhwc>::kBlocks)
    filter_grad_toeplitz(FilterGrad a, Cut c, int parts, int channel_blocks) {
  using V = Variant<T, column_tiles, row_tiles, nhwc>;
  extern __shared__ __align__(16) unsigned char memory[];
  const Conv2d& g = a.g;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c0 = int(blockIdx.x % channel_blocks) * c.channels;
  const int piece = int(blockIdx.x / channel_blocks) % c.pieces, part = int(blockIdx.x / channel_blocks) / c.pieces;
  const int kh = piece % c.pieces_down * V::kRows, kw = piece / c.pieces_down * V::kColumns;
  const int64_t channel = c0 + warp;
  const bool live = channel < g.channels;
  T* planes = reinterpret_cast<T*>(memory);
  T* gradients = planes + c.channels * c.plane;
  T *plane = planes + warp * c.plane, *gradient = gradients + warp * c.gradient;
  T* zeros = gradients + c.channels * c.gradient;
  for (int i = threadIdx.x; i < c.channels * c.gradient + kStep; i += blockDim.x) gradients[i] = from_float<T>(0.f);
  __syncthreads();  // the zeros are written before a tile's gradient overwrites some of them

  typename V::Sums sum = {};
  float bias = 0.f;
  for (int64_t tile = part; tile < c.tiles; tile += parts) {
    const Place at(V(), g, c, tile, kh, kw);
    load<V>(a, c, at, c0, planes, gradients);
    cp_async_wait<0>();
    __syncthreads();
    if (live) {
#pragma unroll 1
      for (int image = 0; image < at.images; ++image)
#pragma unroll 1
        for (int column = 0; column < at.span.columns; column += kStep)
          multiply<V>(c, at, image, column, plane, gradient, zeros, sum);
      if (a.with_bias && piece == 0) bias += sum_of(c, at, gradient + kGap);
    }
    __syncthreads();  // before the next tile comes
  }

  if (!live) return;
  write_sums<V>(a, part, channel, kh, kw, sum);
  if (!a.with_bias || piece != 0) return;
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) bias += __shfl_down_sync(0xffffffffu, bias, lanes);
  if (lane == 0) a.sum(part, g.kernel_h * g.kernel_w, channel) = bias;
}

// How many parts the batch has: those with which the tiles are done soonest, where blocks run in rounds if the GPU does
// not hold all at once. But the sums of a part, written and read again, must not pass an eighth of what it reads.
int parts_of(const Conv2d& g, const Cut& c, int64_t blocks, int64_t at_once) {
  constexpr int kMostRounds = 4;
  const int64_t sums = 8 * (g.kernel_h * g.kernel_w + 1), read = 2 * g.batch * (g.in_h * g.in_w + g.out_h * g.out_w);
  const int64_t most = std::min(read / sums / 8, c.tiles);
  const auto steps = [&](int64_t n) { return ceil_div(c.tiles, n) * ceil_div(n * blocks, at_once); };
  int64_t best = 1;
  for (int64_t n = 2; n <= most && n * blocks <= kMostRounds * at_once; ++n)
    if (steps(n) < steps(best)) best = n;
  return int(best);
}

// Calls f with the filter's Variant; false where there is none.
template <class F>
bool by_variant(const Conv2d& g, Dtype dtype, F f) {
  if (!is_wide(g, dtype)) return false;
  const bool small =
      g.kernel_h <= Variant<bf16, 1, 1, true>::kRows && g.kernel_w <= Variant<bf16, 1, 1, true>::kColumns;
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (g.nhwc)
        small ? f(Variant<T, 1, 1, true>()) : f(Variant<T, 2, 2, true>());
      else
        small ? f(Variant<T, 1, 1, false>()) : f(Variant<T, 2, 2, false>());
    }
  });
  return true;
}

enum Kernel { kScalars, kInVectors };  // how NCHW rows are copied

}  // namespace

// Plan::kernel is a Kernel. A block has 32 threads, a warp, for each channel.
MaybePlan plan_toeplitz_filter_grad(const Conv2d& g, Dtype dtype, bool aligned, const Device& device) {
  MaybePlan made;
  if (g.nhwc && !aligned) return made;
  by_variant(g, dtype, [&](auto variant) {
    using V = decltype(variant);
    Cut c = cut<V>(g, aligned);
    const auto bytes = [&] { return c.elements() * int(sizeof(typename V::T)); };
    // Half of the channels where all do not fit, as in toeplitz.cu.
    for (c.channels = V::kMostChannels; bytes() > device.block_shared; c.channels /= 2)
      if (c.channels == 8) return;
    Plan plan{Family::toeplitz};
    plan.kernel = aligned ? kInVectors : kScalars;
    plan.rows = c.height;
    plan.threads = 32 * c.channels;
    plan.shared = bytes();
    const int64_t blocks = ceil_div(g.channels, c.channels) * c.pieces;
    plan.parts = parts_of(g, c, blocks, device.multiprocessors * V::kBlocks);
    plan.blocks = blocks * plan.parts;
    made = plan;
  });
  return made;
}

void launch_toeplitz(const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  by_variant(a.g, dtype, [&](auto variant) {
    using V = decltype(variant);
    constexpr int kColumnTiles = V::kColumnTiles, kRowTiles = V::kRowTiles;
    constexpr bool nhwc = V::nhwc;
    using T = typename V::T;
    Cut c = cut<V>(a.g, plan.kernel == kInVectors);
    c.channels = plan.threads / 32;
    allow_shared(reinterpret_cast<const void*>(&filter_grad_toeplitz<T, kColumnTiles, kRowTiles, nhwc>), plan.shared);
    filter_grad_toeplitz<T, kColumnTiles, kRowTiles, nhwc>
        <<<grid("filter_grad_toeplitz", plan.blocks), dim3(plan.threads), plan.shared, stream>>>(
            a, c, plan.parts, int(ceil_div(a.g.channels, c.channels)));
    check_launch("filter_grad_toeplitz");
  });
}

}  // namespace rkl::cuda
