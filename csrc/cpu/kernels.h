// What csrc/ops.cpp calls: the CPU kernels, over dense memory. Each splits its work over torch's thread pool by the
// tensors' shapes and the machine, so that results do not depend on the number of threads.
#pragma once
#include "activation.h"
#include "cpu/simd/scratch.h"
#include "geometry.h"

namespace rkl::cpu {

// A depthwise step's filter and bias, widened and in the order that the kernels read them in.
struct PackedFilter {
  LineVector<float> weights, bias;
};

// A pointwise step's filter, (outputs, channels) or (channels, outputs), and its bias or null.
struct PointwiseFilter {
  const void *weight, *bias;
  int64_t outputs, channels;
  bool by_channel;  // its rows are the channels', as in the gradient of an image

  // It is packed, and multiplied by, in blocks of so many outputs; floats of one.
  static constexpr int64_t kOutputs = 64;
  int64_t blocks() const { return ceil_div(outputs, kOutputs); }
  int64_t block_size() const { return kOutputs * (channels + 1); }
  int64_t packed_size() const { return blocks() * block_size(); }
};

// A pointwise step over rows of channels: out (rows, outputs) = act(in (rows, channels) times filter + bias).
struct PointwiseRows {
  const void* in;
  void* out;
  int64_t rows, channels, outputs;
  Activation act;
  bool streams;  // outputs go past the caches; their rows are whole lines then
};

// Some pixels' share of a pointwise filter's gradient: sums (outputs, channels) += dz^T hidden, of dz (pixels, outputs)
// and hidden (pixels, channels). Both may be some columns of a matrix.
struct PointwiseShare {
  const void *dz, *hidden;
  int64_t dz_row, hidden_row;  // elements from one pixel's to the next's
  int64_t pixels, outputs, channels;
  float* sums;         // by blocks of channels, as a filter is packed: (block, output, channel of the block)
  int64_t sums_block;  // floats from one block's to the next's
  bool fresh;          // whether the sums begin here, with zeros
  int64_t piece;       // pixels at once
  float* scratch;      // of scratch_size(piece, outputs) floats

  // A line of memory more than there is: rows a power of 2 apart would share few of the cache's sets.
  static int64_t packed_row(int64_t columns) { return ceil_div(columns, 16) * 16 + 16; }
  static int64_t scratch_size(int64_t piece, int64_t outputs) {
    return piece * (packed_row(outputs) + PointwiseFilter::kOutputs);
  }
};

// The kernels for elements of one type, as compiled for one instruction set.
struct Kernels {
  int64_t together;  // channels that a kernel takes at once: one or two whole vectors

  void (*trelu)(const void* x, void* y, int64_t n);
  void (*trelu_backward)(const void* grad, const void* y, void* dx, int64_t n);

  // y = act(x * weight + bias), in two parts for whoever applies one filter to many bands; bias may be null.
  // image_bytes: of the images that a band's are a part of, else 0.
  PackedFilter (*pack_filter)(const Conv2d& g, const void* weight, const void* bias);
  void (*depthwise_packed)(const Conv2d& g, const void* x, const PackedFilter& filter, Activation act,
                           int64_t image_bytes, void* y);
  // The gradients of x, weight and bias; each may be null where it is not wanted.
  void (*depthwise_backward)(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx,
                             void* dweight, void* dbias);

  // Blocks [first, last) of a pointwise filter in the order that they are read in, and of a pointwise step's outputs.
  // packed: of block 0. Serial. Of bf16 the channels must be an even number.
  void (*pack_pointwise)(const PointwiseFilter& filter, int64_t first, int64_t last, float* packed);
  void (*pointwise_rows)(const PointwiseRows& rows, int64_t first, int64_t last, const float* packed);
  // Serial.
  void (*add_pointwise_share)(const PointwiseShare& share);

  // Over a dense matrix of rows by channels: out = act(z + bias), and grad times the activation's derivative, from its
  // output or its input. out may be the first argument; bias may be null.
  void (*epilogue)(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels);
  void (*activation_backward)(const void* grad, const void* values, Activation act, bool from_output, void* out,
                              int64_t n);

  // Serial, over a band that is in cache.
  void (*widen)(const void* in, float* out, int64_t n);
  void (*add_column_sums)(const void* matrix, double* sums, int64_t rows, int64_t columns);
  // Planes (channels, pixels) into rows (pixels, channels), and back; plane, row: elements from one's start to the
  // next's.
  void (*planes_to_rows)(const void* planes, int64_t plane, void* rows, int64_t row, int64_t channels, int64_t pixels);
  void (*rows_to_planes)(const void* rows, int64_t row, void* planes, int64_t plane, int64_t channels, int64_t pixels);
  // The sum of `count` shares of n values each, `stride` floats apart, in fp64. block: floats from
  // PointwiseFilter::kOutputs values to the next as many.
  void (*sum_shares)(const float* shares, int64_t count, int64_t stride, int64_t block, void* out, int64_t n);
};

struct KernelTable {
  Kernels f32, bf16, f16;
};

// Dense images from NCHW to NHWC, or back.
void transpose_images(const void* from, void* to, bool to_nhwc, int64_t batch, int64_t channels, int64_t pixels,
                      Dtype dtype);

// Whether PyTorch's own convolution makes a depthwise output sooner than these kernels: of large NHWC images of fewer
// channels than a vector has lanes.
bool left_to_pytorch(const Conv2d& g, Dtype dtype);

// Those for elements of this type, of the widest instruction set that this machine has, or that ATEN_CPU_CAPABILITY
// (PyTorch's own variable: default, avx2 or avx512) allows.
const Kernels& kernels(Dtype dtype);

}  // namespace rkl::cpu
