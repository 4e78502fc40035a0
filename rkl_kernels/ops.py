"""The operators: schema, shape rule and gradient of each, once, for every backend.

A backend is a namespace of ``torch.ops`` with these operators in it: ``rkl`` (C++ on the CPU, CUDA C++ on a GPU; the
dispatcher tells them apart by the tensors' device) and ``rkl_triton``. Schemas stand here rather than in C++, so that
the operators exist where no extension is built, and so that every backend shares the gradient's formula. The kernels
register themselves: csrc/ops.cpp, csrc/cuda/ops_cuda.cpp and rkl_kernels/triton/__init__.py.

Forward and backward are operators of their own. The depthwise pair is closed under differentiation, so it can be
differentiated any number of times.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

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
    # y: the forward's output, from which the last activation's gradient is told; None where there is no activation.
    # mask: which of the gradients of (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias).
    "separable_conv2d_backward": (
        "(Tensor grad, Tensor? y, Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_bias, "
        f"{_WINDOW}, int inner_activation, int activation, bool[5] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}

_libraries: list[torch.library.Library] = []


def output_size(x: Tensor, kernel: torch.Size, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Height and width of a convolution's output."""
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]


def output_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last where the image or the filter is: the rule of ``F.conv2d``."""
    if torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight)):
        return torch.channels_last
    return torch.contiguous_format


def _wanted(mask: list[bool], *like: Tensor) -> tuple[Tensor, ...]:
    """Fake gradients: shaped as ``like`` where wanted, empty elsewhere; image gradients keep the image's format."""
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
    return _wanted(mask, x, weight, x.new_empty(x.shape[1]))


def _fake_separable(x, depthwise, pointwise, db, pb, stride, padding, dilation, inner, activation):  # type: ignore[no-untyped-def]
    size = output_size(x, depthwise.shape[2:], stride, padding, dilation)
    shape = (x.shape[0], pointwise.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=output_format(x, depthwise))


def _fake_separable_backward(  # type: ignore[no-untyped-def]
    grad, y, x, depthwise, pointwise, db, stride, padding, dilation, inner, activation, mask
):
    biases = x.new_empty(x.shape[1]), x.new_empty(pointwise.shape[0])
    return _wanted(mask, x, depthwise, pointwise, *biases)


def _fake_trelu(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _fake_trelu_backward(grad: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(y)


def _fake_trelu_(x: Tensor) -> None:
    return None


def _none_where_unwanted(mask: list[bool], grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [g if m else None for g, m in zip(grads, mask, strict=True)]


def _trelu_gradients(ops: Any) -> dict[str, tuple[Any, Any]]:
    """dy/dx = 1 where y > 0, 1 - y^2 elsewhere: the output is all that is kept."""

    def setup(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ops.trelu_backward(grad, *ctx.saved_tensors)

    def setup_again(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward_again(ctx: Any, second: Tensor) -> tuple[Tensor, Tensor]:
        grad, y = ctx.saved_tensors
        return ops.trelu_backward(second, y), torch.where(y > 0, 0, -2 * y * grad * second)

    return {"trelu": (setup, backward), "trelu_backward": (setup_again, backward_again)}


def _depthwise_gradients(ops: Any) -> dict[str, tuple[Any, Any]]:
    """The image's gradient is a convolution with the flipped filter, the filter's a correlation of image and gradient;
    both are bilinear, so their own gradients are made of the same two operators."""

    def setup(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, _, *ctx.window = inputs
        ctx.save_for_backward(x, weight)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mask = list(ctx.needs_input_grad[:3])
        grads = ops.depthwise_conv2d_backward(grad, *ctx.saved_tensors, *ctx.window, mask)
        return *_none_where_unwanted(mask, grads), None, None, None

    def setup_again(ctx: Any, inputs: Any, output: Any) -> None:
        grad, x, weight, *ctx.window, ctx.mask = inputs
        ctx.save_for_backward(grad, x, weight)

    def backward_again(ctx: Any, *seconds: Tensor) -> tuple[Any, ...]:
        grad, x, weight = ctx.saved_tensors
        gx, gw, gb = (s if m else None for s, m in zip(seconds, ctx.mask, strict=True))
        want_grad, want_x, want_weight = ctx.needs_input_grad[:3]
        to_grad = to_x = to_weight = None
        if want_grad:
            to_grad = torch.zeros_like(grad)
            if gx is not None:
                to_grad = to_grad + ops.depthwise_conv2d(gx, weight, None, *ctx.window)
            if gw is not None:
                to_grad = to_grad + ops.depthwise_conv2d(x, gw, None, *ctx.window)
            if gb is not None:
                to_grad = to_grad + gb[:, None, None]
        if want_x and gw is not None:
            to_x = ops.depthwise_conv2d_backward(grad, x, gw, *ctx.window, [True, False, False])[0]
        if want_weight and gx is not None:
            to_weight = ops.depthwise_conv2d_backward(grad, gx, weight, *ctx.window, [False, True, False])[1]
        return to_grad, to_x, to_weight, None, None, None, None

    return {"depthwise_conv2d": (setup, backward), "depthwise_conv2d_backward": (setup_again, backward_again)}


def _separable_gradients(ops: Any) -> dict[str, tuple[Any, Any]]:
    """The depthwise output is made again in backward: one activation less is kept."""

    def setup(ctx: Any, inputs: Any, output: Tensor) -> None:
        *tensors, _, ctx.stride, ctx.padding, ctx.dilation, ctx.inner, ctx.activation = inputs
        ctx.save_for_backward(output if ctx.activation else None, *tensors)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mask = list(ctx.needs_input_grad[:5])
        settings = ctx.stride, ctx.padding, ctx.dilation, ctx.inner, ctx.activation
        grads = ops.separable_conv2d_backward(grad, *ctx.saved_tensors, *settings, mask)
        return *_none_where_unwanted(mask, grads), *[None] * 5

    def setup_again(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    def backward_again(ctx: Any, *seconds: Tensor) -> None:
        raise NotImplementedError(
            "separable_conv2d cannot be differentiated twice by this backend; "
            "run it under rkl_kernels.use_backend('reference')"
        )

    return {"separable_conv2d": (setup, backward), "separable_conv2d_backward": (setup_again, backward_again)}


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
    """Define every operator in ``torch.ops.<namespace>``, with its fake kernel and gradient; the kernels come apart.

    Returns the operators' default overloads as attributes, which spares the overload's resolution at each call.
    """
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    ops = SimpleNamespace(**{name: getattr(getattr(torch.ops, namespace), name).default for name in SCHEMAS})
    for gradients in (_trelu_gradients, _depthwise_gradients, _separable_gradients):
        for name, (setup, backward) in gradients(ops).items():
            torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup, lib=library)
    return ops


rkl = define("rkl")
rkl_triton = define("rkl_triton")
