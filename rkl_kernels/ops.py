"""The operators: their schemas, their shape rules, and all that is registered with them, once for every backend.

A backend is a namespace of ``torch.ops`` with these operators in it: ``rkl`` (C++ on the CPU, CUDA C++ on a GPU; the
dispatcher tells them apart by the tensors' device) and ``rkl_triton``. Schemas stand here rather than in C++, so that
the operators exist where no extension is built, and every backend shares the formulas. The kernels are registered in
csrc/ops.cpp, csrc/cuda/ops_cuda.cpp and _backends.py (Triton's, from rkl_kernels/triton/__init__.py).

Forward and backward are separate operators. The gradients of the depthwise pair use the same pair, so it can be
differentiated any number of times.

    gradients.py        the gradients' formulas
    _autocast.py        what is cast under torch.autocast
    batching.py         the rules of torch.vmap
    decompositions.py   the operators written in PyTorch's own, for exporters that know no others
    counting.py         floating-point operations, for torch.utils.flop_counter
    sharding.py         what torch.distributed.tensor shards
    _operator.py        how a plain call skips those of these that it does not need
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import _autocast, batching, counting, decompositions, gradients, sharding
from ._later import when_imported
from ._operator import DepthwiseOperator, Operator, below_autograd
from ._surroundings import intercepted

_WINDOW = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"

SCHEMAS = {
    "trelu": "(Tensor x) -> Tensor",
    "trelu_": "(Tensor(a!) x) -> ()",
    "trelu_backward": "(Tensor grad, Tensor y) -> Tensor",
    "depthwise_conv2d": f"(Tensor x, Tensor weight, Tensor? bias, {_WINDOW}) -> Tensor",
    # mask: which of the gradients of (x, weight, bias) are wanted; the others come back empty.
    "depthwise_conv2d_backward": (
        f"(Tensor grad, Tensor x, Tensor weight, {_WINDOW}, bool[3] mask) -> (Tensor, Tensor, Tensor)"
    ),
    # activations: position in _checks.ACTIVATIONS plus one, 0 for none.
    "separable_conv2d": (
        "(Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_bias, Tensor? pointwise_bias, "
        f"{_WINDOW}, int inner_activation, int activation) -> Tensor"
    ),
    # y: the forward's output, which gives the last activation's gradient; None where there is no activation.
    # mask: which gradients of (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias) are wanted.
    "separable_conv2d_backward": (
        "(Tensor grad, Tensor? y, Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_bias, "
        f"{_WINDOW}, int inner_activation, int activation, bool[5] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}

INFERENCE_SCHEMAS = {
    "depthwise_conv2d_activated": f"(Tensor x, Tensor weight, Tensor? bias, {_WINDOW}, int activation) -> Tensor",
    "conv2d_activated": (f"(Tensor x, Tensor weight, Tensor? bias, {_WINDOW}, int groups, int activation) -> Tensor"),
}
"""Operators that the layers of folded.py use in plain calls without gradients. They have no gradient, and only the
compiled backends have them."""

_libraries: list[torch.library.Library] = []


def output_size(x: Tensor, kernel: torch.Size, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Height and width of a convolution's output."""
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]


def output_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The output's memory format: channels_last if the image or the filter is channels_last, as in ``F.conv2d``."""
    if torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight)):
        return torch.channels_last
    return torch.contiguous_format


def wanted(mask: Sequence[bool], *like: Tensor) -> tuple[Tensor, ...]:
    """Uninitialized gradients: of the shape and memory format of ``like`` where ``mask`` says so, empty elsewhere."""
    return tuple(
        torch.empty_like(t, memory_format=suggest_memory_format(t)) if m else t.new_empty(0)
        for m, t in zip(mask, like, strict=True)
    )


def _fake_depthwise(x, weight, bias, stride, padding, dilation):  # type: ignore[no-untyped-def]
    size = output_size(x, weight.shape[2:], stride, padding, dilation)
    return torch.empty(
        (x.shape[0], x.shape[1], *size), dtype=x.dtype, device=x.device, memory_format=output_format(x, weight)
    )


def _fake_depthwise_backward(grad, x, weight, stride, padding, dilation, mask):  # type: ignore[no-untyped-def]
    return wanted(mask, x, weight, x.new_empty(x.shape[1]))


def _fake_separable(x, depthwise, pointwise, db, pb, stride, padding, dilation, inner, activation):  # type: ignore[no-untyped-def]
    size = output_size(x, depthwise.shape[2:], stride, padding, dilation)
    shape = (x.shape[0], pointwise.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=output_format(x, depthwise))


def _fake_separable_backward(  # type: ignore[no-untyped-def]
    grad, y, x, depthwise, pointwise, db, stride, padding, dilation, inner, activation, mask
):
    biases = x.new_empty(x.shape[1]), x.new_empty(pointwise.shape[0])
    return wanted(mask, x, depthwise, pointwise, *biases)


def _fake_trelu(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _fake_trelu_backward(grad: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(y)


def _fake_trelu_(x: Tensor) -> None:
    return None


def _fake_plain_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, stride, padding, dilation, transposed, output_padding, groups, mask
):
    made = wanted(mask, x, weight, x.new_empty(grad.shape[1]))
    return tuple(gradient if is_wanted else None for gradient, is_wanted in zip(made, mask, strict=True))


_FAKES: dict[str, Any] = {
    "trelu": _fake_trelu,
    "trelu_": _fake_trelu_,
    "trelu_backward": _fake_trelu_backward,
    "depthwise_conv2d": _fake_depthwise,
    "depthwise_conv2d_backward": _fake_depthwise_backward,
    "separable_conv2d": _fake_separable,
    "separable_conv2d_backward": _fake_separable_backward,
}


def define(namespace: str) -> Any:
    """Define every operator in ``torch.ops.<namespace>``, with everything that PyTorch needs except its kernels.

    Returns an object that has an :class:`Operator` for each of them, as an attribute of its name.
    """
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    packets = getattr(torch.ops, namespace)
    ops = SimpleNamespace(**{name: Operator(getattr(packets, name).default) for name in SCHEMAS})
    if namespace == "rkl":
        ops.depthwise_conv2d = DepthwiseOperator(packets.depthwise_conv2d.default)
    for name, (setup, backward) in gradients.formulas(ops).items():
        in_place = name == "trelu_"
        getattr(ops, name).differentiate((setup, backward), in_place)
        if in_place:
            _register_in_place(library, ops.trelu_, ops.trelu)
        else:
            torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup, lib=library)
    for name in _autocast.CONVOLUTIONS:
        _autocast.register(library, name, getattr(ops, name).registered)
    for name, rule in batching.rules(ops).items():
        torch.library.register_vmap(f"{namespace}::{name}", rule, lib=library)
    for name, decomposition in decompositions.DECOMPOSITIONS.items():
        declare: Any = torch._decomp.register_decomposition(getattr(ops, name).registered)
        declare(decomposition)
    names = [f"{namespace}::{name}" for name in SCHEMAS]
    when_imported("torch._inductor.lowering", lambda: _keep_whole(names))
    when_imported("torch.utils.flop_counter", lambda: counting.register(packets))
    when_imported("torch.distributed.tensor", lambda: sharding.register(packets))
    return ops


def _keep_whole(names: list[str]) -> None:
    """Let Inductor call the operators as they are. Where the environment variable CI is set, Inductor refuses an
    operator that has a decomposition and is not in this list."""
    from torch._inductor import lowering

    for name in names:
        lowering.FALLBACK_ALLOW_LIST.add(name)


def _register_in_place(library: torch.library.Library, operator: Operator, out_of_place: Operator) -> None:
    """Register an in-place operator's kernels for autograd and below it: one differentiates, one counts the write. A
    third, for ``torch.func.functionalize``, writes by an operator that it knows."""
    registered = operator.registered

    def count(keyset: Any, x: Tensor) -> None:
        torch.autograd.graph.increment_version(x)
        registered.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, x)

    def differentiate(keyset: Any, x: Tensor) -> None:
        # torch.compile takes a write of an operator that is not PyTorch's for one that autograd does not see, and
        # selective checkpointing does not see it at all.
        if intercepted(x):
            x.copy_(out_of_place(x))
        elif torch.is_grad_enabled() and x.requires_grad:
            operator.function.apply(x)  # type: ignore[union-attr]
        else:
            with below_autograd():
                registered.redispatch(keyset & torch._C._after_autograd_keyset, x)

    def copy(x: Tensor) -> None:
        x.copy_(out_of_place.registered(x))

    name = registered._schema.name.split("::")[1]
    library.impl(name, count, "ADInplaceOrView", with_keyset=True)
    library.impl(name, differentiate, "Autograd", with_keyset=True)
    library.impl(name, copy, "Functionalize")


def _define_for_inference(ops: SimpleNamespace) -> None:
    for name, schema in INFERENCE_SCHEMAS.items():
        _libraries[0].define(name + schema)
        setattr(ops, name, Operator(getattr(torch.ops.rkl, name).default))


rkl = define("rkl")
_define_for_inference(rkl)
_libraries.append(torch.library.Library("aten", "FRAGMENT"))
torch.library.register_fake(  # for compiled autograd, which traces the backward of a plain call
    "aten::convolution_backward_overrideable", _fake_plain_backward, lib=_libraries[-1]
)
rkl_triton = define("rkl_triton")
