// The Python module `emulated`: the kernels of csrc/cuda/kernels.h, the seeded bugs, and the emulator's settings.
// Pointers are integers here (tensor.data_ptr()), and so are streams, for which the tests pass 0.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/plan_cache.h"
#include "cuda/pointwise.h"
#include "emulator.h"
#include "seeded_bugs.h"
#include "warp_functions.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

// The type in which an argument of a launch comes from Python, and its conversion.
template <class T>
struct Passed {
  using type = T;
  static T unpack(T v) { return v; }
};
template <class T>
struct Passed<T*> {
  using type = uintptr_t;
  static T* unpack(uintptr_t v) { return reinterpret_cast<T*>(v); }
};
template <>
struct Passed<rkl::Activation> {
  using type = int;
  static rkl::Activation unpack(int v) { return rkl::Activation(v); }
};

template <class R, class... P>
void define(py::module_& m, const char* name, R (*launch)(P...)) {
  m.def(name, [launch](typename Passed<P>::type... arguments) { return launch(Passed<P>::unpack(arguments)...); });
}

void bind_emulator(py::module_& m) {
  py::enum_<emulator::Order>(m, "Order")
      .value("forward", emulator::Order::forward)
      .value("reverse", emulator::Order::reverse)
      .value("shuffled", emulator::Order::shuffled);
  py::class_<emulator::Schedule>(m, "Schedule")
      .def_readwrite("order", &emulator::Schedule::order)
      .def_readwrite("seed", &emulator::Schedule::seed)
      .def_readwrite("late_copies", &emulator::Schedule::late_copies)
      .def_readwrite("first_blocks", &emulator::Schedule::first_blocks)
      .def_readwrite("last_blocks", &emulator::Schedule::last_blocks)
      .def_readwrite("removed", &emulator::Schedule::removed);
  py::class_<emulator::Traffic>(m, "Traffic")
      .def_readonly("launches", &emulator::Traffic::launches)
      .def_readonly("blocks", &emulator::Traffic::blocks)
      .def_readonly("read", &emulator::Traffic::read)
      .def_readonly("written", &emulator::Traffic::written);
  m.attr("schedule") = py::cast(&emulator::schedule, py::return_value_policy::reference);
  m.def("traffic", [] { return emulator::traffic; }, "Kernel's name to its traffic since reset().");
  m.def("reset", &emulator::reset, "Frees the device's memory: tensors in it must not be used any more.");
  m.def(
      "allocate",
      [](size_t bytes, bool fill) { return py::memoryview::from_memory(emulator::allocate(bytes, fill), bytes); },
      "bytes"_a, "fill"_a = true);
}

void bind_plans(py::module_& m) {
  using namespace rkl::cuda;
  py::class_<Device>(m, "Device")
      .def(py::init([](int capability, int multiprocessors, int block_shared, int multiprocessor_shared,
                       int multiprocessor_threads, int multiprocessor_blocks) {
             return Device{
                 capability,           multiprocessors, block_shared, multiprocessor_shared, multiprocessor_threads,
                 multiprocessor_blocks};
           }),
           "capability"_a, "multiprocessors"_a, "block_shared"_a, "multiprocessor_shared"_a, "multiprocessor_threads"_a,
           "multiprocessor_blocks"_a);
  py::enum_<Family>(m, "Family")
      .value("general", Family::general)
      .value("rows", Family::rows)
      .value("registers", Family::registers)
      .value("planes", Family::planes)
      .value("toeplitz", Family::toeplitz);
  py::enum_<Result>(m, "Result")
      .value("output", Result::output)
      .value("data_grad", Result::data_grad)
      .value("filter_grad", Result::filter_grad)
      .value("both_grads", Result::both_grads);
  py::class_<Plan>(m, "Plan")
      .def_readonly("family", &Plan::family)
      .def_readonly("kernel", &Plan::kernel)
      .def_readonly("rows", &Plan::rows)
      .def_readonly("parts", &Plan::parts)
      .def_readonly("blocks", &Plan::blocks)
      .def_readonly("threads", &Plan::threads)
      .def_readonly("shared", &Plan::shared);
  py::class_<BackwardPlan>(m, "BackwardPlan")
      .def_readonly("data_grad", &BackwardPlan::data_grad)
      .def_readonly("filter_grad", &BackwardPlan::filter_grad)
      .def_readonly("both_grads", &BackwardPlan::both_grads)
      .def("workspace", &BackwardPlan::workspace);
  m.def("current_device", &current_device);
  define(m, "plan_result", plan_result);
  define(m, "plan_forward", plan_forward);
  define(m, "plan_backward", plan_backward);
  m.def(
      "plans_made",
      [](const std::vector<int64_t>& batches) {
        int made = 0;
        for (const int64_t batch : batches)
          remembered(plan_key({batch}, rkl::Dtype::f32, true, {}, 0), [&] {
            ++made;
            return MaybePlan(Plan{});
          });
        return made;
      },
      "How many plans are made where those of these batches are asked for, one after another, and remembered.");
}

void bind_kernels(py::module_& m) {
  using namespace rkl;
  py::enum_<Dtype>(m, "Dtype").value("f32", Dtype::f32).value("bf16", Dtype::bf16).value("f16", Dtype::f16);
  py::class_<Conv2d>(m, "Conv2d")
      .def(py::init([](int64_t batch, int64_t channels, int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w,
                       int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w,
                       int dilation_h, int dilation_w, bool nhwc) {
             return Conv2d{batch,    channels, in_h,      in_w,      out_h,      out_w,      kernel_h, kernel_w,
                           stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, nhwc};
           }),
           py::kw_only(), "batch"_a, "channels"_a, "in_h"_a, "in_w"_a, "out_h"_a, "out_w"_a, "kernel_h"_a, "kernel_w"_a,
           "stride_h"_a, "stride_w"_a, "padding_h"_a, "padding_w"_a, "dilation_h"_a, "dilation_w"_a, "nhwc"_a);
  define(m, "trelu", cuda::trelu);
  define(m, "trelu_backward", cuda::trelu_backward);
  define(m, "epilogue", cuda::epilogue);
  define(m, "plane_epilogue", cuda::plane_epilogue);
  define(m, "plane_sums_workspace", cuda::plane_sums_workspace);
  define(m, "plane_sums", cuda::plane_sums);
  define(m, "takes_planes", cuda::takes_planes);
  define(m, "left_to_pytorch", cuda::left_to_pytorch);
  define(m, "transposes", cuda::transposes);
  define(m, "can_transpose", cuda::can_transpose);
  define(m, "transpose", cuda::transpose);
  define(m, "activation_backward", cuda::activation_backward);
  define(m, "column_sums_workspace", cuda::column_sums_workspace);
  define(m, "column_sums", cuda::column_sums);
  define(m, "plan_separable", cuda::plan_separable);
  define(m, "fused_separable", cuda::fused_separable);
  define(m, "serves_pointwise", cuda::serves_pointwise);
  define(m, "pointwise", cuda::pointwise);

  define(m, "depthwise", cuda::depthwise);
  define(m, "plan_depthwise_backward", cuda::plan_depthwise_backward);
  define(m, "depthwise_backward", cuda::depthwise_backward);
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  bind_emulator(m);
  bind_kernels(m);
  bind_plans(m);
  auto bugs = m.def_submodule("seeded_bugs");
  for (const auto& [name, launch] : seeded_bugs()) define(bugs, name.c_str(), launch);
  auto warps = m.def_submodule("warp_functions");
  for (const auto& [name, launch] : warp_function_tests()) define(warps, name.c_str(), launch);
}
