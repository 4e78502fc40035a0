// The pointwise step in 16 bits: pixels by channels times a filter of outputs by channels on the tensor cores. Bias and
// activation are applied before the one rounding. After a library's product both are a pass that reads and writes the
// output again, which was 30 % of a MobileNetV2's inference (256 images, bf16, H100).
//
// A block keeps the filter of up to 128 outputs in shared memory and makes tiles of 128 pixels, one after the other. It
// copies their channels by 32 into a ring, which runs on across tiles: while one tile is finished, the next one's
// channels are copied. Neighbouring blocks share their pixels, which are read from memory once. Each of four warps
// makes half of the pixels by half of the outputs.
#include <algorithm>
#include <iterator>

#include "cuda/activation.cuh"
#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/fragments.cuh"
#include "cuda/pointwise.h"
#include "cuda/ptx.cuh"

namespace rkl::cuda {
namespace {

constexpr int kPixels = 128, kDeep = 32, kStages = 4, kThreads = 128;
constexpr int kUnits = kDeep / 8;                                    // 16-byte pieces of a row of the ring
constexpr int kWarpPixels = kPixels / 2, kTiles = kWarpPixels / 16;  // pixels of a warp, and mmas that cover them

struct Product {
  const void *image, *filter, *bias;
  void* out;
  int pixels, channels, outputs;
  int across, tiles;  // blocks beside each other across the outputs; tiles of pixels
  Activation act;

  // 16-byte pieces of an output's filter that are multiplied, and of its row in shared memory: an odd number, so that
  // neighbouring rows lie in different banks.
  __host__ __device__ int units() const { return (channels + 15) / 16 * 2; }
  __host__ __device__ int pitch() const { return units() | 1; }
};

// Where a piece lies in a stage of the ring. Two rows lie in 128 bytes. The order of a row's pieces changes with every
// second row, so that the pieces of one number in eight successive rows lie in different banks.
__device__ inline uint32_t place(int row, int unit) { return uint32_t(row * kUnits + (unit ^ row / 2 % kUnits)) * 16; }

// Copies a thread's pieces of a stage: the same channels of every 32nd of the tile's pixels.
template <class T>
struct StageLoader {
  static constexpr int kRowStep = kThreads / kUnits;
  int unit, row, tile, channel, step;  // the next stage to be loaded: its tile, and its first channel

  __device__ StageLoader(int tile, int step)
      : unit(threadIdx.x % kUnits), row(threadIdx.x / kUnits), tile(tile), channel(0), step(step) {}

  __device__ void load(const Product& p, uint32_t stage) {
    const int at = channel + unit * 8, pixel = tile * kPixels + row;
    const bool there = tile < p.tiles && at < p.channels;
    const T* image = static_cast<const T*>(p.image);
#pragma unroll
    for (int i = 0; i < kPixels / kRowStep; ++i) {
      const bool inside = there && pixel + i * kRowStep < p.pixels;
      const unsigned from = inside ? unsigned(pixel + i * kRowStep) * p.channels + at : 0;
      cp_async_16_or_zeros(stage + place(row + i * kRowStep, unit), image + from, inside);
    }
    cp_async_commit();
    channel += kDeep;
    if (channel >= p.channels) channel = 0, tile += step;
  }
};

// Starts the copies of a block's filter. They are in one cp.async group with the first stage's.
template <class T, int width>
__device__ inline void load_filter(const Product& p, uint32_t filter, int first_output) {
  const int units = p.units(), pitch = p.pitch();
  for (int i = threadIdx.x; i < width * units; i += kThreads) {
    const int row = i / units, unit = i - row * units, output = first_output + row;
    const bool inside = output < p.outputs && unit * 8 < p.channels;
    const unsigned from = inside ? unsigned(output * p.channels + unit * 8) : 0;
    cp_async_16_or_zeros(filter + (row * pitch + unit) * 16, static_cast<const T*>(p.filter) + from, inside);
  }
}

// How many blocks the registers of a multiprocessor suffice for.
constexpr int blocks_for(int width) { return width == 128 ? 2 : width == 96 ? 3 : width == 64 ? 4 : 5; }

template <class T, int width>
__global__ void __launch_bounds__(kThreads, blocks_for(width)) multiply_pixels(Product p) {
  constexpr int kPairs = width / 32;  // a warp makes so many pairs of 8 outputs
  constexpr int kStageBytes = kPixels * kDeep * 2, kPitch = 2 * kPairs + 1;
  extern __shared__ __align__(128) unsigned char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int block_output = blockIdx.x % p.across * width, first_tile = blockIdx.x / p.across;
  const int step = gridDim.x / p.across, first_pixel = warp / 2 * kWarpPixels, first_output = warp % 2 * (width / 2);
  const uint32_t ring = opaque(shared_address(memory));
  const uint32_t buffer = ring + kStages * kStageBytes + warp * (16 * kPitch * 16);  // 16 pixels of a warp's outputs
  const uint32_t filters = ring + kStages * kStageBytes + 4 * (16 * kPitch * 16), filter_pitch = p.pitch() * 16;
  const uint32_t filter_at = filters + (first_output + lane / 16 * 8 + lane % 8) * filter_pitch + lane / 8 % 2 * 16;
  load_filter<T, width>(p, filters, block_output);
  StageLoader<T> loader(first_tile, step);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) loader.load(p, ring + s * kStageBytes);

  int slot = 0;
  for (int tile = first_tile; tile < p.tiles; tile += step) {
    float sums[kTiles][2 * kPairs][4] = {};
    for (int channel = 0; channel < p.channels; channel += kDeep) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage has arrived for all; all have read the one before, whose slot is loaded next
      loader.load(p, ring + (slot + kStages - 1) % kStages * kStageBytes);
      const uint32_t stage = ring + slot * kStageBytes;
      slot = (slot + 1) % kStages;
#pragma unroll
      for (int half = 0; half < kDeep / 16; ++half) {
        if (channel + half * 16 >= p.channels) break;
        uint32_t in[kTiles][4];
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
          ldmatrix_x4(in[i], stage + place(first_pixel + i * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          uint32_t filter[4];
          ldmatrix_x4(filter, filter_at + j * 16 * filter_pitch + (channel / 8 + half * 2) * 16);
#pragma unroll
          for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int k = 0; k < 2; ++k)
              mma_m16n8k16<T>(sums[i][2 * j + k], in[i], filter[2 * k], filter[2 * k + 1], sums[i][2 * j + k]);
        }
      }
    }

    const int pixel = tile * kPixels + first_pixel, output = block_output + first_output;
    if (const T* bias = static_cast<const T*>(p.bias))
#pragma unroll
      for (int j = 0; j < 2 * kPairs; ++j)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int o = output + j * 8 + lane % 4 * 2 + k;
          const float b = o < p.outputs ? to_float(bias[o]) : 0.f;
#pragma unroll
          for (int i = 0; i < kTiles; ++i) sums[i][j][k] += b, sums[i][j][k + 2] += b;
        }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      activate_all<T, true>(p.act, reinterpret_cast<float (&)[kPairs * 8]>(sums[i]));
      __syncwarp();  // the outputs before have been read
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        put_row<T>(buffer + (lane % 16 * kPitch + 2 * j + lane / 16) * 16,
                   reinterpret_cast<const float (&)[2][4]>(sums[i][2 * j]));
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {  // 16 pixels have 32 * kPairs pieces of 16 bytes
        const int piece = lane + j * 32, row = piece / (2 * kPairs), unit = piece % (2 * kPairs);
        const int to_pixel = pixel + i * 16 + row, to_output = output + unit * 8;
        if (to_pixel < p.pixels && to_output < p.outputs)
          *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + unsigned(to_pixel) * p.outputs + to_output) =
              load_shared_16(buffer + (row * kPitch + unit) * 16);
      }
    }
  }
  cp_async_wait<0>();
}

// Outputs of a tile. Idle outputs cost their products; each tile across the outputs reads the pixels from the cache.
int width_for(int64_t outputs) {
  constexpr int kWidths[] = {128, 96, 64, 32}, kAcross = 32;
  const auto cost = [&](int width) { return ceil_div(outputs, width) * (width + kAcross); };
  return *std::min_element(std::begin(kWidths), std::end(kWidths), [&](int a, int b) { return cost(a) < cost(b); });
}

int shared_of(int width, int pitch) {
  return kStages * kPixels * kDeep * 2 + 4 * 16 * (width / 16 + 1) * 16 + width * pitch * 16;
}

template <class T, int width>
void launch(Product p, const Device& device, cudaStream_t stream) {
  p.across = int(ceil_div(p.outputs, width));
  p.tiles = int(ceil_div(p.pixels, kPixels));
  const int shared = shared_of(width, p.pitch()), by_shared = device.blocks_by_shared(shared);
  const int at_once = std::clamp(by_shared, 1, blocks_for(width)) * device.multiprocessors;
  const int blocks = std::min(p.tiles, std::max(1, at_once / p.across)) * p.across;
  allow_shared(reinterpret_cast<const void*>(&multiply_pixels<T, width>), shared);
  multiply_pixels<T, width><<<grid("multiply_pixels", blocks), dim3(kThreads), shared, stream>>>(p);
}

template <class T>
void multiply(const Product& p, const Device& device, cudaStream_t stream) {
  switch (width_for(p.outputs)) {
    case 128:
      return launch<T, 128>(p, device, stream);
    case 96:
      return launch<T, 96>(p, device, stream);
    case 64:
      return launch<T, 64>(p, device, stream);
    default:
      return launch<T, 32>(p, device, stream);
  }
}

}  // namespace

// With more channels, a library's product, which uses Hopper's own instructions, and a pass after it are faster: 728 to
// 728 channels take 137 us instead of 229, 384 to 64 the same, but 256 to 256 take 496 instead of 354 (bf16, H100).
constexpr int64_t kMostChannels = 256;
constexpr int64_t kMostOutputs = (int64_t(1) << 31) / kMostChannels;  // offsets in the filter have 31 bits

bool serves_pointwise(int64_t channels, int64_t outputs, Activation act, Dtype dtype, bool aligned,
                      const Device& device) {
  if (dtype == Dtype::f32 || !aligned || act == Activation::gelu) return false;
  if (channels < 1 || channels > kMostChannels || channels % 8 || outputs % 8 || outputs > kMostOutputs) return false;
  Product p{};
  p.channels = int(channels);
  return shared_of(width_for(outputs), p.pitch()) <= device.block_shared;
}

void pointwise(const void* image, const void* filter, const void* bias, Activation act, void* out, int64_t pixels,
               int64_t channels, int64_t outputs, Dtype dtype, const Device& device, cudaStream_t stream) {
  constexpr int64_t kMostElements = int64_t(1) << 31, kBytes = 2;  // offsets have 32 bits; bytes of an element
  const int64_t most = std::max<int64_t>(1, kMostElements / std::max(channels, outputs) / kPixels) * kPixels;
  for (int64_t first = 0; first < pixels; first += most) {
    const Product p{static_cast<const char*>(image) + first * channels * kBytes,
                    filter,
                    bias,
                    static_cast<char*>(out) + first * outputs * kBytes,
                    int(std::min(most, pixels - first)),
                    int(channels),
                    int(outputs),
                    0,
                    0,
                    act};
    dtype == Dtype::bf16 ? multiply<bf16>(p, device, stream) : multiply<f16>(p, device, stream);
  }
  check_launch("multiply_pixels");
}

}  // namespace rkl::cuda
