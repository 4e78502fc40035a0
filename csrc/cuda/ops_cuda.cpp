// The operators on a GPU: guards, outputs, layouts and the stream here, kernels in the .cu files.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "conv2d_op.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/pointwise.h"
#include "depthwise_op.h"
#include "module.h"
#include "separable_op.h"
#include "trelu_op.h"

namespace rkl {
namespace {

// Makes the tensor's device current for the launches of one operator, and names the stream they go to.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& x) : guard(x.get_device_index()) {
    void* raw = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &raw));
    stream = static_cast<cudaStream_t>(raw);
  }

  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

struct CudaTRelu {
  static void forward(const void* x, void* y, int64_t n, Dtype dtype, const Tensor& like) {
    cuda::trelu(x, y, n, dtype, OnDeviceOf(like).stream);
  }
  static void backward(const void* grad, const void* y, void* dx, int64_t n, Dtype dtype, const Tensor& like) {
    cuda::trelu_backward(grad, y, dx, n, dtype, OnDeviceOf(like).stream);
  }
};

Tensor workspace(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {n}, std::optional<ScalarType>(ScalarType::Float));
}
// A dense NCHW image as a batch of matrices of channels by pixels: a view.
Tensor planes_of(const Tensor& x) {
  return torch::stable::view(x, std::vector<int64_t>{x.size(0), x.size(1), x.size(2) * x.size(3)});
}

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// Kernels of the convolutions, as DepthwiseOps takes them.
struct CudaConv : TransposedFormats<CudaConv> {
  static bool left_to_pytorch(const Conv2d& g, Dtype dtype, bool finished) {
    return cuda::left_to_pytorch(g, dtype, finished);
  }
  static bool transposes(const Conv2d& g, Dtype dtype, bool of_filter) { return cuda::transposes(g, dtype, of_filter); }
  static Tensor transposed_image(const Tensor& x, bool nhwc) {
    const int64_t n = x.size(0), c = x.size(1), pixels = x.size(2) * x.size(3);
    const Dtype dtype = dtype_of(x, "x");
    if (!cuda::can_transpose(n, c, pixels, dtype, x.const_data_ptr())) return rkl::in_format(rkl::dense(x, nhwc), nhwc);
    Tensor out = empty_image(x, n, c, x.size(2), x.size(3), nhwc);
    cuda::transpose(x.const_data_ptr(), out.mutable_data_ptr(), nhwc, n, c, pixels, dtype, OnDeviceOf(x).stream);
    return out;
  }
  static void forward(const Conv2d& g, const void* x, const void* weight, const void* bias, Activation act, void* y,
                      Dtype dtype, const Tensor& like) {
    const OnDeviceOf device(like);
    cuda::depthwise(g, x, weight, bias, act, y, dtype, device.stream);
  }
  static void epilogue(const void* z, const void* bias, Activation act, void* out, int64_t rows, int64_t channels,
                       Dtype dtype, const Tensor& like) {
    cuda::epilogue(z, bias, act, out, rows, channels, dtype, OnDeviceOf(like).stream);
  }
  static void backward(const Conv2d& g, const void* grad, const void* x, const void* weight, void* dx, void* dweight,
                       void* dbias, Dtype dtype, const Tensor& like) {
    const OnDeviceOf device(like);
    const cuda::BackwardPlan plan = cuda::plan_depthwise_backward(g, grad, x, dx, dweight, dbias, dtype);
    const Tensor sums = workspace(like, plan.workspace(g));
    cuda::depthwise_backward(plan, g, grad, x, weight, dx, dweight, dbias, floats(sums), dtype, device.stream);
  }
};

// The filter, or a copy where it does not begin at a multiple of 16 bytes, as the kernels of pointwise steps need. A
// view into one buffer of all parameters may begin anywhere.
Tensor aligned(const Tensor& filter) {
  return cuda::aligned_16(filter.const_data_ptr()) ? filter : torch::stable::clone(filter);
}

// out = act(image * filter + bias) over NHWC images in one kernel; nullopt where it does not serve. filter: (C', C).
std::optional<Tensor> pointwise_in_one(const Tensor& image, const Tensor& filter, const std::optional<Tensor>& bias,
                                       Activation act, Dtype dtype) {
  const OnDeviceOf device(image);
  const int64_t n = image.size(0), c = image.size(1), h = image.size(2), w = image.size(3), outputs = filter.size(0);
  const void* from = image.const_data_ptr();
  const cuda::Device& facts = cuda::current_device();
  if (!cuda::serves_pointwise(c, outputs, act, dtype, cuda::aligned_16(from), facts)) return std::nullopt;
  const Tensor by = aligned(as_contiguous(filter));
  Tensor out = empty_image(image, n, outputs, h, w, true);
  cuda::pointwise(from, by.const_data_ptr(), data_or_null(bias), act, out.mutable_data_ptr(), n * h * w, c, outputs,
                  dtype, facts, device.stream);
  return out;
}

// Kernels of the separable convolution, as SeparableOps takes them.
struct CudaSeparable : CudaConv {
  static bool takes_planes(const Conv2d& g, int64_t, Dtype dtype, bool backward) {
    return cuda::takes_planes(g, dtype, backward);
  }
  static void activation_backward(const void* grad, const void* values, Activation act, bool from_output, void* out,
                                  int64_t rows, int64_t channels, Dtype dtype, const Tensor& like) {
    cuda::activation_backward(grad, values, act, from_output, out, rows * channels, dtype, OnDeviceOf(like).stream);
  }
  // cuBLAS is faster than cuDNN on whole 128-byte rows, and otherwise up to 1.7 times slower (728 to 728 channels, 19
  // px, H100). fp32 stays with cuBLAS, whose products are exact by default; cuDNN's are in TF32.
  static bool by_cudnn(const SeparableCall& call, const Tensor& image, const Tensor& filter) {
    constexpr int64_t kRow = 64;
    return call.dtype != Dtype::f32 && (image.size(1) % kRow || filter.size(0) % kRow);
  }
  static Tensor pointwise_by_cudnn(const SeparableCall& call, const Tensor& image, const Tensor& filter,
                                   const std::optional<Tensor>& bias, Activation act) {
    const std::vector<int64_t> ones{1, 1}, zeros{0, 0};
    const Tensor out = dense(aten("aten::convolution", "", image, as_filter(as_contiguous(filter)),
                                  std::optional<Tensor>(), ones, zeros, ones, false, zeros, int64_t(1)),
                             true);
    return finish_pointwise<CudaSeparable>(call, out, bias, act);
  }
  static Tensor pointwise(const SeparableCall& call, const Tensor& image, const Tensor& filter,
                          const std::optional<Tensor>& bias, Activation act) {
    if (call.g.nhwc && (bias || act != Activation::none))
      if (std::optional<Tensor> y = pointwise_in_one(image, filter, bias, act, call.dtype)) return *y;
    if (call.g.nhwc && by_cudnn(call, image, filter)) return pointwise_by_cudnn(call, image, filter, bias, act);
    if (call.g.nhwc) return pointwise_by_matrix<CudaSeparable>(call, image, filter, bias, act);
    // filter (C', C) times each image's (C, pixels), as a batch of products that share the filter: nothing is
    // transposed.
    const Conv2d& g = call.g;
    const int64_t pixels = g.out_h * g.out_w, outputs = filter.size(0);
    Tensor out = empty_image(image, g.batch, outputs, g.out_h, g.out_w, false);
    const std::vector<int64_t> shared{g.batch, outputs, filter.size(1)};
    aten("aten::bmm", "out", aten("aten::expand", "", filter, shared, false), planes_of(image), planes_of(out));
    if (bias || act != Activation::none)
      cuda::plane_epilogue(out.const_data_ptr(), data_or_null(bias), act, out.mutable_data_ptr(), g.batch, outputs,
                           pixels, call.dtype, OnDeviceOf(image).stream);
    return out;
  }
  static void filter_gradient(const SeparableCall& call, const Tensor& dz, const Tensor& hidden, const Tensor& out) {
    const Conv2d& g = call.g;
    const int64_t pixels = g.out_h * g.out_w, results = call.c_out * g.channels;
    if (g.nhwc) return filter_gradient_by_matrix(dz, hidden, out);
    // One product for each image, and their sum, where a product is less than what transposing both would move.
    if (results >= (call.c_out + g.channels) * pixels)
      return filter_gradient_by_matrix(dense(dz, true), dense(hidden, true), out);
    const std::vector<int64_t> size{g.batch, call.c_out, g.channels};
    const Tensor products = torch::stable::new_empty(dz, size);
    aten("aten::bmm", "out", planes_of(dz), torch::stable::transpose(planes_of(hidden), 1, 2), products);
    const OnDeviceOf device(dz);
    const Tensor sums = workspace(dz, cuda::column_sums_workspace(g.batch, results));
    cuda::column_sums(products.const_data_ptr(), out.mutable_data_ptr(), g.batch, results, floats(sums), call.dtype,
                      device.stream);
  }
  static void channel_sums(const SeparableCall& call, const Tensor& image, const Tensor& out) {
    const OnDeviceOf device(image);
    if (!call.g.nhwc) {
      const int64_t pixels = call.g.out_h * call.g.out_w;
      const Tensor sums = workspace(image, cuda::plane_sums_workspace(call.g.batch, call.c_out, pixels));
      cuda::plane_sums(image.const_data_ptr(), out.mutable_data_ptr(), call.g.batch, call.c_out, pixels, floats(sums),
                       call.dtype, device.stream);
      return;
    }
    const Tensor sums = workspace(image, cuda::column_sums_workspace(call.rows, call.c_out));
    cuda::column_sums(image.const_data_ptr(), out.mutable_data_ptr(), call.rows, call.c_out, floats(sums), call.dtype,
                      device.stream);
  }

  static std::optional<Tensor> fused_forward(const SeparableCall& call, const std::optional<Tensor>& pointwise_bias) {
    const Conv2d& g = call.g;
    if (!g.nhwc) return std::nullopt;
    const OnDeviceOf device(call.x);
    const void* x = call.x.const_data_ptr();
    const cuda::MaybePlan plan = cuda::plan_separable(g, call.c_out, call.inner_act, call.act, call.dtype,
                                                      cuda::aligned_16(x), cuda::current_device());
    if (!plan) return std::nullopt;
    const Tensor pointwise = aligned(call.pointwise);
    Tensor y = empty_image(call.x, g.batch, call.c_out, g.out_h, g.out_w, true);
    cuda::fused_separable(*plan, g, call.c_out, x, call.depthwise.const_data_ptr(), pointwise.const_data_ptr(),
                          data_or_null(call.depthwise_bias), data_or_null(pointwise_bias), call.inner_act, call.act,
                          y.mutable_data_ptr(), call.dtype, device.stream);
    return y;
  }

  // No kernel makes all of backward at once: SeparableOps takes the unfused steps.
  static bool fused_backward(const SeparableCall&, const Tensor&, const std::optional<Tensor>&,
                             const PointwiseGradients&) {
    return false;
  }
};

struct CudaConv2d {
  static constexpr bool kBiasIsFree = false;
  static std::optional<Tensor> pointwise_in_one(const Tensor& image, const Tensor& filter,
                                                const std::optional<Tensor>& bias, Activation act, Dtype dtype) {
    return rkl::pointwise_in_one(image, filter, bias, act, dtype);
  }
  static void bias_and_activation(const Tensor& x, const std::optional<Tensor>& bias, Activation act, Dtype dtype) {
    const int64_t n = x.size(0), c = x.size(1), pixels = x.size(2) * x.size(3);
    const OnDeviceOf device(x);
    void* const memory = x.mutable_data_ptr();
    if (is_dense(x, true))
      cuda::epilogue(memory, data_or_null(bias), act, memory, n * pixels, c, dtype, device.stream);
    else
      cuda::plane_epilogue(memory, data_or_null(bias), act, memory, n, c, pixels, dtype, device.stream);
  }
};

// The numbers of a Conv2d, in its order.
Conv2d conv2d_of(const std::vector<int64_t>& geometry, bool nhwc) {
  STD_TORCH_CHECK(geometry.size() == 14, "geometry must have 14 numbers, got ", geometry.size());
  const auto n = [&](int i) { return geometry[i]; };
  const auto small = [&](int i) { return int(geometry[i]); };
  return {n(0),     n(1),     n(2),      n(3),      n(4),      n(5),      small(6), small(7),
          small(8), small(9), small(10), small(11), small(12), small(13), nhwc};
}

// A GPU's facts as plan.h has them; the current device's where `facts` is empty.
cuda::Device device_of(const std::vector<int64_t>& facts) {
  if (facts.empty()) return cuda::current_device();
  STD_TORCH_CHECK(facts.size() == 6, "device must have 6 numbers, got ", facts.size());
  const auto n = [&](int i) { return int(facts[i]); };
  return {n(0), n(1), n(2), n(3), n(4), n(5)};
}

std::vector<int64_t> numbers_of(const cuda::MaybePlan& plan, bool nhwc) {
  if (!plan) return {};
  return {int64_t(plan->family), plan->kernel, plan->rows,  plan->parts, plan->blocks,
          plan->threads,         plan->shared, plan->steps, nhwc};
}

// Stands in the place of a family for PyTorch's own convolution; the format alone follows it.
constexpr int64_t kPyTorch = 5;

// The plan of a depthwise convolution's result, for rk.explain and the tests: family, kernel, rows, parts, blocks,
// threads, shared, steps, and whether the result is computed in NHWC, to which images may be transposed. All tensors
// are taken to begin at multiples of 16 bytes. Empty where no family makes the result, as may be for
// Result::both_grads.
std::vector<int64_t> depthwise_plan(std::vector<int64_t> geometry, bool nhwc, int64_t dtype, int64_t result,
                                    std::vector<int64_t> device, bool with_bias) {
  Conv2d g = conv2d_of(geometry, nhwc);
  const cuda::Result wanted = cuda::Result(result);
  g.nhwc = nhwc || cuda::transposes(g, Dtype(dtype), wanted != cuda::Result::output);
  if (wanted == cuda::Result::output && cuda::left_to_pytorch(g, Dtype(dtype), with_bias)) return {kPyTorch, g.nhwc};
  return numbers_of(cuda::plan_result(wanted, g, Dtype(dtype), true, device_of(device)), g.nhwc);
}

// The same for a separable convolution in one kernel. Empty where it runs unfused, as with NCHW images that are read as
// they are. nhwc: the output's format, which is NHWC wherever the images' is.
std::vector<int64_t> separable_plan(std::vector<int64_t> geometry, bool nhwc, int64_t c_out, int64_t inner,
                                    int64_t activation, int64_t dtype, std::vector<int64_t> device) {
  Conv2d g = conv2d_of(geometry, nhwc);
  if (!nhwc && cuda::takes_planes(g, Dtype(dtype), false)) return {};
  g.nhwc = true;
  return numbers_of(
      cuda::plan_separable(g, c_out, Activation(inner), Activation(activation), Dtype(dtype), true, device_of(device)),
      g.nhwc);
}

}  // namespace
}  // namespace rkl

STABLE_TORCH_LIBRARY_FRAGMENT(rkl, m) {
  m.def(
      "cuda_depthwise_plan(int[] geometry, bool nhwc, int dtype, int result, int[] device=[], bool with_bias=False) "
      "-> int[]");
  m.def(
      "cuda_separable_plan(int[] geometry, bool nhwc, int c_out, int inner_activation, int activation, int dtype, "
      "int[] device=[]) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(rkl, CompositeExplicitAutograd, m) {
  m.impl("cuda_depthwise_plan", RKL_BOX(rkl::depthwise_plan));
  m.impl("cuda_separable_plan", RKL_BOX(rkl::separable_plan));
}

STABLE_TORCH_LIBRARY_IMPL(rkl, CUDA, m) {
  using Cuda = rkl::TReluOps<rkl::CudaTRelu>;
  m.impl("trelu", RKL_BOX(Cuda::forward));
  m.impl("trelu_", RKL_BOX(Cuda::forward_));
  m.impl("trelu_backward", RKL_BOX(Cuda::backward));
  using Depthwise = rkl::DepthwiseOps<rkl::CudaConv>;
  m.impl("depthwise_conv2d", RKL_BOX(Depthwise::forward));
  m.impl("depthwise_conv2d_backward", RKL_BOX(Depthwise::backward));
  m.impl("depthwise_conv2d_activated", RKL_BOX(Depthwise::activated));
  m.impl("conv2d_activated", RKL_BOX(rkl::Conv2dOps<rkl::CudaConv2d>::activated));
  using Separable = rkl::SeparableOps<rkl::CudaSeparable>;
  m.impl("separable_conv2d", RKL_BOX(Separable::forward));
  m.impl("separable_conv2d_backward", RKL_BOX(Separable::backward));
}

STABLE_TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  using Depthwise = rkl::DepthwiseOps<rkl::CudaConv>;
  m.impl("convolution_overrideable", RKL_BOX(Depthwise::convolution));
  m.impl("convolution_backward_overrideable", RKL_BOX(Depthwise::convolution_backward));
}

RKL_PYTHON_MODULE(_C_cuda)
