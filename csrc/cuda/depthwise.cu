// Depthwise convolution on a GPU: carries out what was planned, and adds the parts of a filter's gradient.
#include "cuda/add_parts.cuh"
#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "cuda/element.cuh"
#include "cuda/kernels.h"

namespace rkl::cuda {
namespace {

// Where a sum of the filter's gradient goes: the parts are (taps + 1, channels), with the bias's gradient as the last
// tap.
template <class T>
struct FilterDestination {
  T *dweight, *dbias;
  int64_t channels;
  int taps;

  __device__ T* operator()(int64_t i) const {
    const int64_t tap = i / channels, c = i - tap * channels;
    if (tap < taps) return dweight + c * taps + tap;
    return dbias ? dbias + c : nullptr;
  }
};

void launch(Result result, const Convolution& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  switch (plan.family) {
    case Family::general:
      return launch_general(result, a, plan, dtype, stream);
    case Family::rows:
      return launch_rows(result, a, plan, dtype, stream);
    case Family::registers:
      return launch_registers(result, a, plan, dtype, stream);
    case Family::planes:
      return launch_planes(result, a, plan, dtype, stream);
    case Family::toeplitz:
      return launch_toeplitz(result, a, plan, dtype, stream);
  }
}

// Result::both_grads is for the families that offer it.
void launch(Result result, const FilterGrad& a, const Plan& plan, Dtype dtype, cudaStream_t stream) {
  switch (plan.family) {
    case Family::general:
      return launch_general(a, plan, dtype, stream);
    case Family::rows:
      return launch_rows(result, a, plan, dtype, stream);
    case Family::registers:
      return launch_registers(result, a, plan, dtype, stream);
    case Family::planes:
      return launch_planes(a, plan, dtype, stream);
    case Family::toeplitz:
      return launch_toeplitz(a, plan, dtype, stream);
  }
}

}  // namespace

void depthwise(const Conv2d& g, const void* x, const void* weight, const void* bias, Activation act, void* y,
               Dtype dtype, cudaStream_t stream) {
  const Plan plan = plan_forward(g, dtype, aligned_16(x, y), current_device());
  launch(Result::output, Convolution{g, x, weight, bias, y, act}, plan, dtype, stream);
}

BackwardPlan plan_depthwise_backward(const Conv2d& g, const void* grad, const void* x, const void* dx,
                                     const void* dweight, const void* dbias, Dtype dtype) {
  const bool aligned = aligned_16(grad, dweight ? x : nullptr, dx);
  BackwardPlan plan = plan_backward(g, dtype, aligned, dx, dweight, current_device());
  const int64_t pixels = g.out_h * g.out_w;
  if (dbias && !dweight)
    plan.bias_sums = g.nhwc ? column_sums_workspace(g.batch * pixels, g.channels)
                            : plane_sums_workspace(g.batch, g.channels, pixels);
  return plan;
}

void depthwise_backward(const BackwardPlan& plan, const Conv2d& g, const void* grad, const void* x, const void* weight,
                        void* dx, void* dweight, void* dbias, float* workspace, Dtype dtype, cudaStream_t stream) {
  if (plan.data_grad)
    launch(Result::data_grad, Convolution{g, grad, weight, nullptr, dx}, *plan.data_grad, dtype, stream);
  const int64_t pixels = g.out_h * g.out_w;
  if (plan.bias_sums)  // the image is not read
    g.nhwc ? column_sums(grad, dbias, g.batch * pixels, g.channels, workspace, dtype, stream)
           : plane_sums(grad, dbias, g.batch, g.channels, pixels, workspace, dtype, stream);
  const MaybePlan& sums = plan.both_grads ? plan.both_grads : plan.filter_grad;
  if (!sums) return;
  const FilterGrad a{g, grad, x, workspace, dbias != nullptr, weight, dx};
  launch(plan.both_grads ? Result::both_grads : Result::filter_grad, a, *sums, dtype, stream);
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int taps = g.kernel_h * g.kernel_w;
    const FilterDestination<T> to{static_cast<T*>(dweight), static_cast<T*>(dbias), g.channels, taps};
    launch_add_parts<T>(workspace, sums->parts, (taps + 1) * g.channels, to, stream);
  });
  check_launch("add_parts");
}

}  // namespace rkl::cuda
