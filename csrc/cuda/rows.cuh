// The row pipeline: depthwise convolution of NHWC images in 16 bits on the tensor cores.
//
// A tap of 8 channels is a diagonal 8 x 8 matrix. The left operand of an mma is pixels by channels, as they lie in
// NHWC. The right operand is two diagonal matrices, one above the other. So one m16n8k16 adds two taps to the sums of
// 16 pixels by 8 channels. The products are exact and nothing is unpacked. 7 of 8 multiplications are by zero; still,
// the tensor cores do 1.3 times what the fp32 units could, with a tenth of the instructions (measured on an H200).
//
// A warp makes 8 channels ("a group") of 32 output columns ("a strip") and slides down the image. cp.async copies rows
// of the image into a ring in shared memory, several rows ahead, with one barrier a row. A tap reads the row from a
// shifted address. Every row of the filter is applied to a row while it is there, so kernel_h rows of sums are in
// flight. The first mma of sums[j] takes sums[j + 1] as its C, so that the window slides without register moves.
//
// A strip is four octets of 8 columns, which are counted through all images of the batch. If maps have 7 columns, it
// covers four images; if they have 19, it ends in the middle of the next image. Octets of one image share their halo.
// Strips at the same place differ in their images alone, so a block makes several of them one after the other.
//
// A filter that is smaller than the compiled one is filled up with zeros. An input that is not finite makes all outputs
// of its group within the compiled filter's window NaN, since zero times infinity is NaN.
#pragma once
#include "activation.h"
#include "cuda/element.cuh"
#include "cuda/fragments.cuh"
#include "cuda/ptx.cuh"
#include "cuda/rows.h"

namespace rkl::cuda::rows {

// Where each octet of a strip lies: its image, counted from the task's first one, its first column, and its first pixel
// in a row of inputs in shared memory.
struct Strip {
  int image, octet;  // those of the first octet
  int octets, octet_pixels, halo;

  // How many images octet o, which is below 4, lies after the first octet.
  __device__ int images_on(int o) const {
    const int c = octet + o;
    return (c >= octets) + (c >= 2 * octets) + (c >= 3 * octets);
  }
  __device__ int image_of(int o) const { return image + images_on(o); }
  __device__ int column(int o) const { return (octet + o - images_on(o) * octets) * kOctet; }
  // The first input pixel of octet o in shared memory.
  __device__ int pixel(int o) const { return o * octet_pixels + images_on(o) * halo; }
};

// What a block makes at a time: output rows of a strip. They are dilation_h apart, so that they share rows of inputs.
struct Task {
  Strip strip;
  int row, rows;      // the first output row, and how many
  int group, images;  // the group of images, and how many it has
  int place = -1;     // the number of the strip and rows within a group

  // Becomes task `number`. Returns whether its place or the number of its images has changed. If not, its images are
  // others, but what threads have computed about their pixels still holds.
  __device__ bool move_to(const Tiling& t, int number) {
    const int places = t.group_strips * t.chunks * t.dilation_h, place_before = place, images_before = images;
    group = number / places;
    place = number - group * places;
    images = min(t.group_images, t.batch - group * t.group_images);
    if (place == place_before && images == images_before) return false;
    int chunk = place / t.group_strips, residue = 0;
    const int first = (place - chunk * t.group_strips) * kOctets, image = first / t.octets;
    strip = {image, first - image * t.octets, t.octets, t.octet_pixels, t.halo};
    if (t.dilation_h > 1) {
      residue = chunk / t.chunks;
      chunk -= residue * t.chunks;
    }
    row = residue + chunk * t.rows * t.dilation_h;
    rows = min(t.rows, (t.out_h - residue + t.dilation_h - 1) / t.dilation_h - chunk * t.rows);
    return true;
  }
};

// The channels that a thread copies, and its first pixel: a block's threads are 32 pixels by t.groups groups.
struct Lane {
  int pixel, group, channel;

  __device__ Lane(const Tiling& t, int channel_block)
      : pixel(threadIdx.x / t.groups),
        group(threadIdx.x - pixel * t.groups),
        channel((channel_block * t.groups + group) * 8) {}
};

// The steps of a task whose rows of inputs are not all padding. Rows of padding add nothing; for a map of 8 rows and a
// filter of 7 rows, they are 6 of 14.
template <int stride>
struct Inside {
  int begin, end;

  // first: the image row that step 0 begins with. Of the two rows of a step of stride 2, only the second may be inside.
  __device__ Inside(int first, int dilation, int height)
      : begin(max(0, stride == 1 ? (dilation - 1 - first) / dilation : -first / 2)),
        end((height - first + stride * dilation - 1) / (stride * dilation)) {}
  __device__ bool has(int s) const { return s >= begin && s < end; }
};

// A pixel's place in a row of shared memory. At stride 2 even columns come before odd ones, so that neighbouring
// outputs read neighbouring places.
template <int stride>
__device__ inline int place(int pixel, int half) {
  return stride == 1 ? pixel : (pixel & 1) * half + (pixel >> 1);
}

// Copies rows to shared memory. A thread copies 16-byte pieces of each row: the same channels of every 32nd pixel.
template <class T, int slots>
struct RowLoader {
  uint32_t to, step;                 // bytes in shared memory: from the row to the first piece, and to the next piece
  uint32_t from[slots];              // elements, from the row's beginning in the group's first image
  bool there[slots], copies[slots];  // whether the row has this piece, and whether it is not padding

  // For rows of inputs, with the strip's halo.
  template <int stride>
  __device__ void init_inputs(const Tiling& t, const Task& task, const Lane& lane) {
    const Strip& s = task.strip;
    init_places<stride>(t, lane, t.width);
#pragma unroll
    for (int i = 0; i < slots; ++i) {
      const int pixel = lane.pixel + 32 * i;
      const int o = (pixel >= s.pixel(1)) + (pixel >= s.pixel(2)) + (pixel >= s.pixel(3));
      const int column = s.column(o) * stride + pixel - s.pixel(o) - t.padding_w;
      set(i, t, pixel < t.width, task.images, s.image_of(o), column, t.in_h, t.in_w, lane.channel);
    }
  }

  // For rows of 32 columns of the output's grid, without a halo.
  __device__ void init_columns(const Tiling& t, const Task& task, const Lane& lane) {
    static_assert(slots == 1, "a thread has one piece of 32 columns");
    const int o = lane.pixel / kOctet, column = task.strip.column(o) + lane.pixel % kOctet;
    init_places<1>(t, lane, 0);
    set(0, t, true, task.images, task.strip.image_of(o), column, t.out_h, t.out_w, lane.channel);
  }

  // Starts the copy of one row, which begins at element `row` in the group's first image. Offsets have 32 bits until
  // they are added to the pointer, since a 64-bit addition takes two instructions.
  __device__ void load(uint32_t shared_row, const T* images, uint32_t row, bool inside) const {
    const uint32_t offset = opaque(inside ? row : 0), here = opaque(shared_row + to);
#pragma unroll
    for (int i = 0; i < slots; ++i)
      if (i == 0 || there[i])  // a row has at least 32 pixels
        cp_async_16_or_zeros(here + i * step, images + (from[i] + offset), inside && copies[i]);
  }

 private:
  template <int stride>
  __device__ void init_places(const Tiling& t, const Lane& lane, int width) {
    to = (place<stride>(lane.pixel, width / 2) * t.pitch + lane.group) * 16;
    step = 32 / stride * t.pitch * 16;
  }
  __device__ void set(int i, const Tiling& t, bool piece, int images, int image, int column, int height, int width,
                      int channel) {
    there[i] = piece;
    copies[i] = piece && image < images && column >= 0 && column < width && channel < t.channels;
    from[i] = copies[i] ? uint32_t((image * height * width + column) * t.channels + channel) : 0;
  }
};

// A group's filter as right operands: pair[kh][q] has columns 2 q and 2 q + 1 of row kh, the last one a single column.
template <class T, int kernel_h, int kernel_w>
struct Taps {
  uint32_t pair[kernel_h][kernel_w / 2 + 1][2];  // [1] of the last column is not used

  __device__ void load(const Tiling& t, const T* weight, int channel, bool flipped) {
    const int lane = threadIdx.x % 32, n = lane / 4, k = lane % 4 * 2, c = channel + n;
    const int taps = t.kernel_h * t.kernel_w;
    const uint16_t* filter = reinterpret_cast<const uint16_t*>(weight) + c * taps;
#pragma unroll
    for (int i = 0; i < kernel_h; ++i)
#pragma unroll
      for (int j = 0; j < kernel_w; ++j) {
        uint32_t value = 0;
        if (c < t.channels && i < t.kernel_h && j < t.kernel_w && (n == k || n == k + 1)) {
          const int tap = i * t.kernel_w + j;
          value = filter[flipped ? taps - 1 - tap : tap];
        }
        pair[i][j / 2][j % 2] = n == k ? value : value << 16;
      }
  }
};

// The addresses from which lanes load a row's left operands, in bytes from the row's beginning. pair[i] + q * step: 16
// pixels as filter columns 2 q and 2 q + 1 read them. last: all 32 pixels as the last column reads them.
template <int kernel_w, int stride>
struct Operands {
  uint32_t pair[2], step, last;

  __device__ void init(const Tiling& t, const Strip& s) {
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
    const auto at = [&](int o, int column) {
      const int pixel = s.pixel(o) + lane % 8 * stride + column * t.dilation_w;
      return uint32_t((place<stride>(pixel, t.width / 2) * t.pitch + group) * 16);
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) pair[i] = at(2 * i + lane % 16 / 8, lane / 16);
    step = 2 / stride * t.dilation_w * t.pitch * 16;
    last = at(lane / 8, kernel_w - 1);
  }
};

// Sums of 32 pixels by 8 channels: two fragments of an mma.
using Sums = float[2][4];
__device__ inline float (&flat(Sums& sums))[8] { return reinterpret_cast<float (&)[8]>(sums); }

// Adds one row of inputs to the sums of the output rows in flight, of which sums[0] is the oldest. phase: the row's
// number modulo the stride. Phase 0 moves the window down by one output row, whose sums begin with the bias.
template <class T, int kernel_h, int kernel_w, int stride, int phase>
__device__ inline void add_row(uint32_t row, const Operands<kernel_w, stride>& at,
                               const Taps<T, kernel_h, kernel_w>& taps, const float (&bias)[4],
                               Sums (&sums)[in_flight(kernel_h, stride)]) {
  constexpr int flight = in_flight(kernel_h, stride), pairs = kernel_w / 2;
#pragma unroll
  for (int q = 0; q <= pairs; ++q) {
    uint32_t a[2][4];
    if (q < pairs) {
      ldmatrix_x4(a[0], row + at.pair[0] + q * at.step);
      ldmatrix_x4(a[1], row + at.pair[1] + q * at.step);
    } else {
      ldmatrix_x4(a[0], row + at.last);
    }
#pragma unroll
    for (int j = 0; j < flight; ++j) {
      const int kh = (flight - 1 - j) * stride + phase;
      if (kh >= kernel_h) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool moves = q == 0 && phase == 0;
        const float* older = !moves ? sums[j][i] : j + 1 < flight ? sums[j + 1 < flight ? j + 1 : j][i] : bias;
        const float (&from)[4] = *reinterpret_cast<const float (*)[4]>(older);
        const uint32_t* b = taps.pair[kh < kernel_h ? kh : 0][q];
        if (q < pairs)
          mma_m16n8k16<T>(sums[j][i], a[i], b[0], b[1], from);
        else
          mma_m16n8k8<T>(sums[j][i], a[0][2 * i], a[0][2 * i + 1], b[0], from);
      }
    }
  }
}

// A row of padding: the window moves on, and a new row begins with the bias.
template <int flight>
__device__ inline void add_nothing(const float (&bias)[4], Sums (&sums)[flight]) {
#pragma unroll
  for (int i = 0; i < flight * 8; ++i)
    sums[i / 8][i / 4 % 2][i % 4] =
        i / 8 + 1 < flight ? sums[i / 8 + 1 < flight ? i / 8 + 1 : 0][i / 4 % 2][i % 4] : bias[i % 4];
}
template <int flight>
__device__ inline void begin_all(const float (&bias)[4], Sums (&sums)[flight]) {
#pragma unroll
  for (int i = 0; i < flight * 8; ++i) sums[i / 8][i / 4 % 2][i % 4] = bias[i % 4];
}

// Copies a thread's 16 bytes of each finished row from shared memory, where put_row has written it, to the image.
template <class T>
struct RowWriter {
  uint32_t begin, to, from;  // elements: of the first row in its group of images, of the next in all; bytes in buffer
  int pitch;                 // elements from a row to the next that is written
  bool writes;

  // Rows of the output's grid from task.row on.
  __device__ void init(const Tiling& t, const Task& task, const Lane& lane) {
    const int o = lane.pixel / kOctet, image = task.strip.image_of(o);
    const int column = task.strip.column(o) + lane.pixel % kOctet;
    writes = image < task.images && column < t.out_w && lane.channel < t.channels;
    begin = ((image * t.out_h + task.row) * t.out_w + column) * t.channels + lane.channel;
    from = (lane.pixel * t.pitch + lane.group) * 16;
    pitch = t.dilation_h * t.out_w * t.channels;
  }
  __device__ void write(T* images, uint32_t buffer) {
    if (writes) *reinterpret_cast<uint4*>(images + to) = load_shared_16(buffer + from);
    to += pitch;
  }
};

}  // namespace rkl::cuda::rows
