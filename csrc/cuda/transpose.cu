// Images from NCHW to NHWC and back, in tiles through shared memory, so that reads and writes both are whole sectors.
// PyTorch's own copy between the formats reads or writes single elements: of 33 x 33 pixels and 2048 channels it took
// 0.5 ms, where a plain copy takes 0.1 (bf16, H100).
#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/kernels.h"

namespace rkl::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 2048;  // words of 4 bytes: 64 pixels of all images by 32 words of channels, or 256 by 8

// Elements of a word.
template <class T>
constexpr int kPack = 4 / sizeof(T);

// Transposes a tile of `words` words of channels. A thread issues all its reads before it stores the first. A word of
// padding follows each pixel's words, so that one word of successive pixels lies in different banks.
template <class T, int words, bool to_nhwc>
__global__ void __launch_bounds__(kThreads)
    transpose_image(const T* __restrict__ from, T* __restrict__ to, int channels, int pixels, int all_pixels) {
  constexpr int kPixels = kTile / words, kColumns = kPixels / 32;                // groups of 32 pixels
  constexpr int kRows = kTile * kPack<T> / kThreads, kWords = kTile / kThreads;  // elements and words of a thread
  __shared__ uint32_t tile[kPixels][words + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_pixel = blockIdx.x * kPixels, first_channel = blockIdx.y * words * kPack<T>;

  // NCHW: a warp has 32 pixels, which lie beside each other, of every (kWarps / kColumns)-th channel.
  const int mine = warp % kColumns * 32 + lane, pixel = first_pixel + mine, image = pixel / pixels;
  const int64_t plane = int64_t(image) * channels * pixels + (pixel - image * pixels);
  const auto channel = [&](int i) { return warp / kColumns + i * (kWarps / kColumns); };
  const auto in_planes = [&](int i) { return pixel < all_pixels && first_channel + channel(i) < channels; };
  const auto at_plane = [&](int i) { return plane + int64_t(first_channel + channel(i)) * pixels; };
  T* const row = reinterpret_cast<T*>(tile[mine]);
  // NHWC: neighbouring threads have neighbouring words of a pixel.
  const int word = threadIdx.x % words, of_word = first_channel + word * kPack<T>;
  const auto tile_pixel = [&](int i) { return int(threadIdx.x) / words + i * (kThreads / words); };
  const auto in_pixels = [&](int i) { return first_pixel + tile_pixel(i) < all_pixels && of_word < channels; };
  const auto at_pixel = [&](int i) { return int64_t(first_pixel + tile_pixel(i)) * channels + of_word; };

  if constexpr (to_nhwc) {
    T read[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (in_planes(i)) read[i] = from[at_plane(i)];
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (in_planes(i)) row[channel(i)] = read[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if (in_pixels(i)) *reinterpret_cast<uint32_t*>(to + at_pixel(i)) = tile[tile_pixel(i)][word];
  } else {
    uint32_t read[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if (in_pixels(i)) read[i] = *reinterpret_cast<const uint32_t*>(from + at_pixel(i));
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if (in_pixels(i)) tile[tile_pixel(i)][word] = read[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (in_planes(i)) to[at_plane(i)] = row[channel(i)];
  }
}

// Words of channels of a tile; a grid's rows are tiles of channels, its columns tiles of pixels.
int words_of(int64_t channels, int pack) { return channels <= 8 * pack ? 8 : 32; }

template <class T, int words, bool to_nhwc>
void launch(const void* from, void* to, int64_t images, int64_t channels, int64_t pixels, cudaStream_t stream) {
  const int64_t across = ceil_div(images * pixels, kTile / words), down = ceil_div(channels, words * kPack<T>);
  transpose_image<T, words, to_nhwc><<<grid("transpose_image", across, down), dim3(kThreads), 0, stream>>>(
      static_cast<const T*>(from), static_cast<T*>(to), int(channels), int(pixels), int(images * pixels));
}

}  // namespace

bool can_transpose(int64_t images, int64_t channels, int64_t pixels, Dtype dtype, const void* from) {
  const int pack = dtype == Dtype::f32 ? 1 : 2;
  return channels % pack == 0 && images * pixels < (int64_t(1) << 31) - kTile &&
         ceil_div(channels, words_of(channels, pack) * pack) <= kMostBlocksDown &&
         reinterpret_cast<uintptr_t>(from) % 4 == 0;
}

void transpose(const void* from, void* to, bool to_nhwc, int64_t images, int64_t channels, int64_t pixels, Dtype dtype,
               cudaStream_t stream) {
  const auto by_words = [&](auto zero, auto direction) {  // bits move; what they mean does not matter
    using T = decltype(zero);
    constexpr bool forth = decltype(direction)::value;
    const auto call = words_of(channels, kPack<T>) == 8 ? launch<T, 8, forth> : launch<T, 32, forth>;
    call(from, to, images, channels, pixels, stream);
  };
  const auto by_direction = [&](auto zero) {
    to_nhwc ? by_words(zero, std::true_type{}) : by_words(zero, std::false_type{});
  };
  dtype == Dtype::f32 ? by_direction(uint32_t{}) : by_direction(uint16_t{});
  check_launch("transpose_image");
}

}  // namespace rkl::cuda
