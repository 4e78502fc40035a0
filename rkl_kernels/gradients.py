"""The operators' gradients. Each formula is written once, for every backend, for plain calls and for the dispatcher.

A formula is a pair ``setup(ctx, inputs, output)`` and ``backward(ctx, *gradients)``. It calls operators of the same
backend, which are the attributes of ``ops``.

A missing gradient arrives as None and is passed on as None, as in PyTorch's own layers. With zeros instead, an
optimizer would decay the weights of a part of the network that is cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, decompositions
from ._operator import Formula
from ._surroundings import differentiated
from .decompositions import separable_conv2d_backward, times_derivative

INVERTIBLE = ("relu", "relu6", "trelu")
"""Activations whose gradient follows from their output, so that the pre-activation need not be kept."""


def formulas(ops: Any) -> dict[str, Formula]:
    """The formula of each operator that has a gradient, by name."""
    return {**_trelu(ops), **_depthwise(ops), **_separable(ops)}


def _none_where_unwanted(mask: list[bool], grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [g if m else None for g, m in zip(grads, mask, strict=True)]


def _wanted(ctx: Any) -> list[bool]:
    """Which inputs' gradients this run of autograd's engine computes, as PyTorch's own formulas ask. A call such as
    ``torch.autograd.grad(loss, images)`` wants no weight's, though the weights require gradients."""
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # of the inputs that require gradients
    return [needed and _executes(next(nodes)) for needed in ctx.needs_input_grad]


def _executes(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # it answers so for a leaf that torch.autograd.grad was asked for
        return True


def _served(ops: Any, name: str) -> Any:
    """A backend's operator. Under ``torch.func`` or forward-mode AD, the same in PyTorch's own operators."""
    return decompositions.DECOMPOSITIONS[name] if differentiated() else getattr(ops, name)


def _gradients(function: Any, tensors: list[Tensor], seconds: Any) -> list[Tensor | None]:
    """The gradients of ``function(*tensors)``, weighted by ``seconds``. In grad mode they are differentiable again.

    ``torch.func.vjp`` is not used: it refuses to run under hooks on saved tensors (``save_on_cpu``, checkpoints).
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, since one of the tensors may depend on another, and that dependence must not count here.
        inputs = [t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in tensors]
        pairs = [(y, s) for y, s in zip(function(*inputs), seconds, strict=True) if y.requires_grad and s is not None]
        if not pairs:
            return [None] * len(tensors)
        outputs, weights = zip(*pairs, strict=True)
        return list(torch.autograd.grad(outputs, inputs, weights, create_graph=again, allow_unused=True))


def _trelu(ops: Any) -> dict[str, Formula]:
    """dy/dx = 1 where y > 0, 1 - y^2 elsewhere. So only the output is kept."""

    def setup(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)

    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else _served(ops, "trelu_backward")(grad, *ctx.saved_tensors)

    def setup_again(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    def backward_again(ctx: Any, second: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if second is None:
            return None, None
        grad, y = ctx.saved_tensors
        return ops.trelu_backward(second, y), torch.where(y > 0, 0, -2 * y * grad * second)

    once = setup, backward
    return {"trelu": once, "trelu_": once, "trelu_backward": (setup_again, backward_again)}


def _depthwise(ops: Any) -> dict[str, Formula]:
    """The image's gradient is a convolution with the flipped filter. The filter's gradient is a correlation of image
    and gradient. Both are bilinear, so their own gradients use the same two operators."""

    def setup(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, weight, _, *ctx.window = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)

    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 6
        mask = _wanted(ctx)[:3]
        grads = ops.depthwise_conv2d_backward(grad, *ctx.saved_tensors, *ctx.window, mask)
        return *_none_where_unwanted(mask, grads), None, None, None

    def setup_again(ctx: Any, inputs: Any, output: Any) -> None:
        grad, x, weight, *ctx.window, ctx.mask = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, x, weight)

    def backward_again(ctx: Any, *seconds: Tensor | None) -> tuple[Any, ...]:
        grad, x, weight = ctx.saved_tensors
        gx, gw, gb = (s if m else None for s, m in zip(seconds, ctx.mask, strict=True))
        want_grad, want_x, want_weight = _wanted(ctx)[:3]
        to_grad = to_x = to_weight = None
        if want_grad and (gx is not None or gw is not None or gb is not None):
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


def _separable(ops: Any) -> dict[str, Formula]:
    """Backward computes the depthwise output again, so that it need not be kept, and the pre-activation too, where the
    last activation's gradient needs it. PyTorch differentiates the reference formula for the second derivative."""

    def setup(ctx: Any, inputs: Any, output: Tensor) -> None:
        *tensors, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.inner, ctx.activation = inputs
        ctx.set_materialize_grads(False)
        name = _checks.activation_name(ctx.activation)
        ctx.again = name if name not in INVERTIBLE else None
        ctx.save_for_backward(bias if ctx.again else None, output if name in INVERTIBLE else None, *tensors)

    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 10
        mask = _wanted(ctx)[:5]
        bias, y, *tensors = ctx.saved_tensors
        settings = ctx.stride, ctx.padding, ctx.dilation, ctx.inner
        last = ctx.activation
        if ctx.again:
            z = _served(ops, "separable_conv2d")(*tensors, bias, *settings, 0)
            grad, last = times_derivative(ctx.again, grad, z, z), 0
        grads = _served(ops, "separable_conv2d_backward")(grad, y, *tensors, *settings, last, mask)
        return *_none_where_unwanted(mask, grads), *[None] * 5

    def setup_again(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.stride, ctx.padding, ctx.dilation, ctx.inner, ctx.activation, ctx.mask = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def backward_again(ctx: Any, *seconds: Tensor | None) -> tuple[Any, ...]:
        settings: Any = ctx.stride, ctx.padding, ctx.dilation, ctx.inner, ctx.activation
        tensors: Any = ctx.saved_tensors
        wanted = [i for i, want in enumerate(_wanted(ctx)) if want]

        def once(*some: Tensor) -> tuple[Tensor, ...]:
            everything: list[Any] = list(tensors)
            for i, t in zip(wanted, some, strict=True):
                everything[i] = t
            everything += [*settings, ctx.mask]
            return separable_conv2d_backward(*everything)

        grads: list[Tensor | None] = [None] * len(tensors)
        for i, grad in zip(wanted, _gradients(once, [tensors[i] for i in wanted], seconds), strict=True):
            grads[i] = grad
        return *grads, *[None] * 6

    return {"separable_conv2d": (setup, backward), "separable_conv2d_backward": (setup_again, backward_again)}
