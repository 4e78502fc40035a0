// The Python module `emulated`: the kernels of csrc/cuda/kernels.h, the seeded bugs, and the emulator's settings.
// Pointers are integers here (tensor.data_ptr()), element types the tests' numbers, streams left out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/kernels.h"
#include "emulator.h"
#include "seeded_bugs.h"
#include "warp_functions.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

// How an argument of a kernel's launch comes from Python.
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
      .def_readwrite("last_blocks", &emulator::Schedule::last_blocks);
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
  define(m, "fused_separable_serves", cuda::fused_separable_serves);
  define(m, "epilogue", cuda::epilogue);
  define(m, "slope", cuda::slope);
  define(m, "column_sums_workspace", cuda::column_sums_workspace);
  define(m, "column_sums", cuda::column_sums);
  define(m, "fused_separable_pays", cuda::fused_separable_pays);
  define(m, "fused_separable_backward_pays", cuda::fused_separable_backward_pays);
  define(m, "fused_separable", cuda::fused_separable);
  define(m, "fused_separable_backward_serves", cuda::fused_separable_backward_serves);
  define(m, "fused_separable_backward_workspace", cuda::fused_separable_backward_workspace);
  define(m, "fused_separable_backward", cuda::fused_separable_backward);

  define(m, "depthwise", cuda::depthwise);
  define(m, "weight_grad_workspace", cuda::weight_grad_workspace);
  define(m, "depthwise_backward", cuda::depthwise_backward);
  py::enum_<cuda::DepthwiseKernel>(m, "DepthwiseKernel")
      .value("general", cuda::DepthwiseKernel::general)
      .value("nhwc", cuda::DepthwiseKernel::nhwc)
      .value("nchw", cuda::DepthwiseKernel::nchw)
      .value("tensor_cores", cuda::DepthwiseKernel::tensor_cores)
      .value("one_pass", cuda::DepthwiseKernel::one_pass);
  py::class_<cuda::DepthwiseKernels>(m, "DepthwiseKernels")
      .def_readonly("forward", &cuda::DepthwiseKernels::forward)
      .def_readonly("input_grad", &cuda::DepthwiseKernels::input_grad)
      .def_readonly("weight_grad", &cuda::DepthwiseKernels::weight_grad);
  define(m, "depthwise_kernels", cuda::depthwise_kernels);
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  bind_emulator(m);
  bind_kernels(m);
  auto bugs = m.def_submodule("seeded_bugs");
  for (const auto& [name, launch] : seeded_bugs()) define(bugs, name.c_str(), launch);
  auto warps = m.def_submodule("warp_functions");
  for (const auto& [name, launch] : warp_function_tests()) define(warps, name.c_str(), launch);
}
