// The CPU kernels that csrc/ops.cpp calls. They take dense memory and run on torch's thread pool. Only the tensors'
// shapes and the machine decide how work is split, so that results do not depend on the number of threads.
#pragma once
#include "activation.h"
#include "cpu/simd/scratch.h"
#include "geometry.h"

namespace rkl::cpu {

// A depthwise step's filter and bias in the layout in which the kernels read them (depthwise/pack.h).
struct PackedFilter {
  LineVector<float> weights, bias;
};

// A pointwise step's filter, (outputs, channels) or (channels, outputs), and its bias or null.
struct PointwiseFilter {
  const void *weight, *bias;
  int64_t outputs, channels;
  bool by_channel;  // the filter is (channels, outputs), as in the gradient of an image

  // The filter is packed and multiplied in blocks of kOutputs outputs. Sizes are in floats and include the bias.
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
  int64_t out_row;  // elements from one row of outputs to the next
  Activation act;
  bool streams;  // outputs are written past the caches (streaming stores); their rows are then whole cache lines
  const void* row_bias;  // a bias of the rows, in the place of the filter's; or null
};

// What some pixels add to a pointwise filter's gradient: sums (outputs, channels) += dz^T hidden, where dz is (pixels,
// outputs) and hidden is (pixels, channels). dz and hidden may each be some columns of a wider matrix.
struct PointwiseShare {
  const void *dz, *hidden;
  int64_t dz_row, hidden_row;  // elements from one pixel to the next
  int64_t pixels, outputs, channels;
  float* sums;         // by blocks of channels, as a filter is packed: (block, output, channel of the block)
  int64_t sums_block;  // floats from one block to the next
  bool fresh;          // whether the sums start from zero; else the share is added to them
  int64_t piece;       // pixels taken at once
  float* scratch;      // of scratch_size(piece, outputs) floats

  // Floats of a packed row: whole cache lines and one more, since rows a power of 2 apart would share few cache sets.
  static int64_t packed_row(int64_t columns) { return ceil_div(columns, 16) * 16 + 16; }
  static int64_t scratch_size(int64_t piece, int64_t outputs) {
    return piece * (packed_row(outputs) + PointwiseFilter::kOutputs);
  }
};

// The kernels for elements of one type, as compiled for one instruction set.
struct Kernels {
  int64_t together;     // channels that a kernel takes at once: one or two whole vectors
  bool streams_planes;  // whether pointwise_rows is the fastest way to write large NCHW outputs

  void (*trelu)(const void* x, void* y, int64_t n);
  void (*trelu_backward)(const void* grad, const void* y, void* dx, int64_t n);

  // y = act(x * weight + bias), in two parts: a caller packs a filter once and applies it to many bands. bias may be
  // null. image_bytes: where x is a band, bytes of the images that the band is cut from; else 0.
  PackedFilter (*pack_filter)(const Conv2d& g, const void* weight, const void* bias);
  void (*depthwise_packed)(const Conv2d& g, const void* x, const PackedFilter& filter, Activation act,
                           int64_t image_bytes, void* y);
  // The gradients of x, weight and bias; each may be null where it is not wanted.
  void (*depthwise_backward)(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx,
                             void* dweight, void* dbias);

  // pack_pointwise packs blocks [first, last) of a pointwise filter; pointwise_rows makes the outputs of those blocks.
  // packed: where block 0 begins. Both are serial. In bf16 the number of channels must be even.
  void (*pack_pointwise)(const PointwiseFilter& filter, int64_t first, int64_t last, float* packed);
  void (*pointwise_rows)(const PointwiseRows& rows, int64_t first, int64_t last, const float* packed);
  // Serial.
  void (*add_pointwise_share)(const PointwiseShare& share);

  // epilogue: out = act(z + bias) over a dense matrix (rows, channels); bias may be null. activation_backward: out =
  // grad times the activation's derivative, from the activation's output or its input. out may be the first argument.
  void (*epilogue)(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels);
  void (*activation_backward)(const void* grad, const void* values, Activation act, bool from_output, void* out,
                              int64_t n);

  // Serial, over a band that is in cache.
  void (*widen)(const void* in, float* out, int64_t n);
  void (*add_column_sums)(const void* matrix, double* sums, int64_t rows, int64_t columns);
  // Planes (channels, pixels) into rows (pixels, channels), and back. plane, row: elements from the start of one plane
  // or row to the start of the next.
  void (*planes_to_rows)(const void* planes, int64_t plane, void* rows, int64_t row, int64_t channels, int64_t pixels);
  void (*rows_to_planes)(const void* rows, int64_t row, void* planes, int64_t plane, int64_t channels, int64_t pixels);
  // The sum in fp64 of `count` shares of n values each. The shares lie `stride` floats apart. A share lies in blocks of
  // PointwiseFilter::kOutputs values, `block` floats apart.
  void (*sum_shares)(const float* shares, int64_t count, int64_t stride, int64_t block, void* out, int64_t n);
};

struct KernelTable {
  Kernels f32, bf16, f16;
};

// Dense images from NCHW to NHWC, or back.
void transpose_images(const void* from, void* to, bool to_nhwc, int64_t batch, int64_t channels, int64_t pixels,
                      Dtype dtype);

// Whether PyTorch's own convolution makes a depthwise output faster than these kernels.
bool left_to_pytorch(const Conv2d& g, Dtype dtype);

// The kernels for elements of this type, for the widest instruction set that this machine has and that
// ATEN_CPU_CAPABILITY (PyTorch's own variable: default, avx2 or avx512) allows.
const Kernels& kernels(Dtype dtype);

}  // namespace rkl::cpu
