// How the row pipeline (rows.cuh) cuts a convolution: the tables of its compiled kernels, and the numbers that every
// block is told.
#pragma once
#include "activation.h"
#include "cuda/plan.h"

namespace rkl::cuda::rows {

constexpr int kOctet = 8, kOctets = 4, kStrip = kOctet * kOctets;  // columns; octets of a strip

constexpr int kRegistersOfAll = 65536;  // of a multiprocessor's threads

// A compiled kernel. slots: 16-byte pieces of a row that a thread copies, so a row has at most 32 * slots pixels.
// groups: at most, so that a block has 32 * groups threads. registers: of a thread, which a test holds the machine code
// to; with them the plan knows how many blocks a multiprocessor has.
struct Kernel {
  int kernel_h, kernel_w, stride, slots, groups, registers;

  // Rows in shared memory, and rows on their way. Wide rows are those of dilated filters, which meet few rows of an
  // image: a small ring leaves room for more blocks, which hide each other's waits.
  constexpr int ring() const { return slots > 3 ? 4 : 8; }
  constexpr int ahead() const { return slots > 3 ? 3 : 6; }
  constexpr int threads() const { return 32 * groups; }
  constexpr int blocks() const { return kRegistersOfAll / (registers * threads()); }
};

// The kernel of pairs of stride 2's data gradient, whose filter is half of the forward's.
constexpr Kernel halved(const Kernel& k) {
  return {(k.kernel_h + 1) / 2, (k.kernel_w + 1) / 2, 1, k.slots, k.groups, k.registers};
}

// Rows of sums that a row of inputs adds to.
RKL_HOST_DEVICE constexpr int in_flight(int kernel_h, int stride) { return (kernel_h + stride - 1) / stride; }

// Sizes of a launch, in 32 bits: larger batches are split.
struct Tiling {
  int batch, in_h, in_w, out_h, out_w, channels;
  int kernel_h, kernel_w, padding_h, padding_w, dilation_h, dilation_w;
  int groups;                      // of 8 channels, of a block
  int pitch;                       // 16-byte pieces between pixels in shared memory: odd, so that 8 neighbouring pixels
                                   // lie in different banks
  int octets;                      // of an output row
  int octet_pixels, halo, width;   // inputs of an octet, what an image's octets share, pixels of a row in shared memory
  int group_images, group_strips;  // the fewest images that are a whole number of strips
  int groups_of_images, channel_blocks;
  int rows, chunks;  // output rows of a task, and tasks down an image (for each residue of the dilation)

  int row_bytes() const { return width * pitch * 16; }
  int column_bytes() const { return kStrip * pitch * 16; }
  int all_chunks() const { return dilation_h * chunks; }
  int places() const { return group_strips * all_chunks(); }
  int64_t tasks() const { return int64_t(places()) * groups_of_images; }
  // Neighbouring blocks have neighbouring channels, then strips, then chunks, so that halos meet in the cache.
  int64_t blocks(int64_t parts) const { return channel_blocks * (parts < tasks() ? parts : tasks()); }
};

// The tiling of g, with `images` of the batch at a time; g is the convolution that the kernel makes.
Tiling tiling(const Conv2d& g, const Kernel& kernel, int images, int rows);

// Images that a launch may have: their elements, and the filter's, are counted in 31 bits. 0 where not even one fits.
int images_at_once(const Conv2d& g);

// The compiled kernels. More than two slots are for dilated filters and stride 2, whose rows are wider. Registers are
// what each takes without spilling in its loops (one spilled register cost a tenth of the time on an H200), rounded up
// to the number at which a multiprocessor still has as many blocks.
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
// By the size of the forward's filter; the slots are those of the pairs.
constexpr Kernel kStride2DataGrads[] = {{3, 3, 2, 2, 8, 128}, {5, 5, 2, 2, 4, 184}, {7, 7, 2, 2, 4, 248}};

// Those of a few instructions, for kernels that activate a row at a time beside the tensor cores. erf takes so many
// that registers are spilled: such kernels leave GELU to a pass of its own.
inline bool is_short(Activation act) { return act != Activation::gelu; }

}  // namespace rkl::cuda::rows
