"""The contestants outside PyTorch: ONNX Runtime and OpenVINO. Both run forward in fp32, on an ONNX graph made here.

The weights are constants of the graph, so both may pack them beforehand. Both get as many threads as torch.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch

from .case import Case
from .machine import held_to
from .rivals import Rival, inputs

NAMES = ("onnxruntime", "openvino")
OPSET = 17


def installed(name: str) -> bool:
    """Whether the runtime and the onnx package, which builds its graph, can be imported."""
    return all(importlib.util.find_spec(module) is not None for module in (name, "onnx"))


def rival(name: str) -> Rival:
    """One of :data:`NAMES` as a contestant. Its images are contiguous. Inside, it may use any layout."""
    return Rival(name, "nchw", {"onnxruntime": _onnxruntime, "openvino": _openvino}[name])


def serves(case: Case, device: str = "cpu") -> bool:
    """Whether the runtimes serve a case: forward in fp32 on the CPU, with an activation that takes few ONNX nodes.

    They serve no case where torch is limited to older instructions, since they choose instructions by themselves.
    """
    if held_to():
        return False
    return (case.direction, case.dtype, device) == ("forward", "fp32", "cpu") and case.activation in (
        None,
        "relu",
        "trelu",
    )


def _check(case: Case, device: str) -> None:
    if not serves(case, device):
        raise ValueError(
            f"serves forward in fp32 on the CPU, held to no instruction set, got {case.direction} in {case.dtype} on "
            f"{device}, held to {held_to()}"
        )


def model(case: Case) -> bytes:
    """The case as a serialized ONNX graph from "x" to "y"."""
    from onnx import TensorProto, helper, numpy_helper

    given = inputs(case)
    nodes, last = [], "x"
    for i, weight in enumerate(given.weights):
        window: dict[str, Any] = {"kernel_shape": list(weight.shape[2:])}
        if i == 0:
            window |= {"strides": [case.stride] * 2, "dilations": [case.dilation] * 2, "pads": [case.padding] * 4}
            window |= {"group": case.channels}
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"conv{i}"], **window))
        last = f"conv{i}"
    constants = [numpy_helper.from_array(w.numpy(), f"w{i}") for i, w in enumerate(given.weights)]
    activation = "trelu" if case.operator == "trelu" else case.activation
    if activation == "relu":
        nodes.append(helper.make_node("Relu", [last], ["y"]))
    elif activation == "trelu":
        constants.append(numpy_helper.from_array(torch.zeros(()).numpy(), "zero"))
        nodes.append(helper.make_node("Greater", [last, "zero"], ["positive"]))
        nodes.append(helper.make_node("Tanh", [last], ["tanh"]))
        nodes.append(helper.make_node("Where", ["positive", last, "tanh"], ["y"]))
    else:
        nodes[-1].output[0] = "y"
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(tensor.shape))
        for name, tensor in (("x", given.x), ("y", given.grad))
    ]
    graph = helper.make_graph(nodes, "case", ends[:1], ends[1:], constants)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model_gen_version(graph, opset_imports=[opset]).SerializeToString()


def _onnxruntime(case: Case, device: str) -> Callable[..., Any]:
    import onnxruntime as ort

    _check(case, device)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin after a call would take cores from the next contestant.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model(case), options, providers=["CPUExecutionProvider"])
    given = inputs(case)

    def run(image: torch.Tensor = given.x) -> Any:
        (y,) = session.run(None, {"x": image.numpy()})
        return (torch.from_numpy(y),)

    return run


def _openvino(case: Case, device: str) -> Callable[..., Any]:
    import openvino as ov

    _check(case, device)
    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(model(case)), "CPU", settings)
    # Two requests alternate, so that a layer does not write where it reads.
    requests = itertools.cycle([compiled.create_infer_request() for _ in range(2)])
    given = inputs(case)

    def run(image: torch.Tensor = given.x) -> Any:
        request, y = next(requests), torch.empty_like(given.grad)
        request.set_input_tensor(ov.Tensor(image.numpy(), shared_memory=True))
        request.set_output_tensor(ov.Tensor(y.numpy(), shared_memory=True))
        request.infer()
        return (y,)

    return run
