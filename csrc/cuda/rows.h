// How the row pipeline (rows.cuh) cuts a convolution: the tables of its compiled kernels, and the sizes that every
// block is given.
#pragma once
#include "activation.h"
#include "cuda/plan.h"

namespace rkl::cuda::rows {

constexpr int kOctet = 8, kOctets = 4, kStrip = kOctet * kOctets;  // columns of an octet; octets, columns of a strip

constexpr int kRegistersOfAll = 65536;  // registers of a multiprocessor

// A compiled kernel. slots: how many 16-byte pieces of a row a thread copies; a row has at most 32 * slots pixels.
// groups: the most groups of 8 channels in a block, which has 32 threads for each. registers: those of a thread; a test
// holds the machine code to them, and the plan computes from them how many blocks a multiprocessor holds.
struct Kernel {
  int kernel_h, kernel_w, stride, slots, groups, registers;

  // How many rows the ring in shared memory holds, and how many rows ahead copies start. Only dilated filters have wide
  // rows, and they read few rows of an image: a small ring leaves room for more blocks, which hide each other's waits.
  constexpr int ring() const { return slots > 3 ? 4 : 8; }
  constexpr int ahead() const { return slots > 3 ? 3 : 6; }
  constexpr int threads() const { return 32 * groups; }
  constexpr int blocks() const { return kRegistersOfAll / (registers * threads()); }
};

// The kernel of stride 2's data gradient as a convolution of pairs (plan.h): its filter has half of the forward's size.
constexpr Kernel halved(const Kernel& k) {
  return {(k.kernel_h + 1) / 2, (k.kernel_w + 1) / 2, 1, k.slots, k.groups, k.registers};
}

// How many output rows one row of inputs adds to. The sums of so many rows are in flight.
RKL_HOST_DEVICE constexpr int in_flight(int kernel_h, int stride) { return (kernel_h + stride - 1) / stride; }

// The sizes of a launch, in 32 bits. A batch that is too large for them is split.
struct Tiling {
  int batch, in_h, in_w, out_h, out_w, channels;
  int kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w;
  int groups;                      // groups of 8 channels in a block
  int pitch;                       // 16-byte pieces between pixels in shared memory: odd, so that 8 neighbouring pixels
                                   // lie in different banks
  int octets;                      // octets in an output row
  int octet_pixels, halo, width;   // pixels in shared memory: of an octet, of the halo of an image's octets, of a row
  int group_images, group_strips;  // the fewest images that fill whole strips, and how many strips
  int groups_of_images, channel_blocks;
  int rows, chunks;  // output rows of a task, and tasks down an image (for each residue of the dilation)

  int row_bytes() const { return width * pitch * 16; }
  int column_bytes() const { return kStrip * pitch * 16; }
  int all_chunks() const { return dilation_h * chunks; }
  int places() const { return group_strips * all_chunks(); }
  int64_t tasks() const { return int64_t(places()) * groups_of_images; }
  // Neighbouring blocks have neighbouring channels, then strips, then chunks, so that they share halos in the cache.
  int64_t blocks(int64_t parts) const { return channel_blocks * (parts < tasks() ? parts : tasks()); }
};

// The tiling of g with `images` images a launch and `rows` rows a task. g is the convolution that the kernel computes.
Tiling tiling(const Conv2d& g, const Kernel& kernel, int images, int rows);

// How many images a launch may have: 31 bits must count their elements, and the filter's. 0 where not even one fits.
int images_at_once(const Conv2d& g);

// The compiled kernels. Those with more than two slots serve dilated filters and stride 2, whose rows are wider.
// registers: what a kernel needs to spill none in its loops (one spilled register cost a tenth of the time on an H200),
// rounded up as far as a multiprocessor still holds as many blocks.
constexpr Kernel kConvolutions[] = {
    {3, 3, 1, 2, 8, 80},  {3, 3, 1, 4, 8, 96},  {3, 3, 2, 3, 8, 80},  {5, 5, 1, 2, 8, 128},
    {5, 5, 1, 4, 8, 128}, {5, 5, 2, 3, 8, 128}, {7, 7, 1, 2, 4, 168}, {7, 7, 1, 4, 4, 168},
    {7, 7, 2, 3, 4, 168}, {3, 7, 1, 2, 8, 128}, {7, 3, 1, 2, 8, 128},
};
constexpr Kernel kFilterGrads[] = {
    {3, 3, 1, 2, 8, 128}, {3, 3, 1, 4, 8, 128}, {3, 3, 2, 3, 8, 128}, {5, 5, 1, 2, 4, 168},
    {5, 5, 1, 4, 4, 168}, {5, 5, 2, 3, 4, 168}, {7, 7, 1, 2, 4, 248}, {7, 7, 1, 4, 4, 248},
    {7, 7, 2, 3, 4, 248}, {3, 7, 1, 2, 4, 168}, {7, 3, 1, 2, 4, 168},
};
constexpr Kernel kBothGrads[] = {{3, 3, 1, 2, 8, 128}, {3, 3, 1, 4, 4, 160}};
// kernel_h and kernel_w are those of the forward's filter; slots are those of the convolution of pairs.
constexpr Kernel kStride2DataGrads[] = {{3, 3, 2, 2, 8, 128}, {5, 5, 2, 2, 4, 184}, {7, 7, 2, 2, 4, 248}};

// Whether an activation is so short that a kernel can apply it to each row beside the tensor cores. GELU's erf takes so
// many instructions that registers are spilled: it is left to a pass of its own.
inline bool is_short(Activation act) { return act != Activation::gelu; }

}  // namespace rkl::cuda::rows
