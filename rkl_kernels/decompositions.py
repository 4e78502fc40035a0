"""The operators written in PyTorch's own operators: for exporters that know no others (ONNX gets Conv, Where and Tanh),
for DTensor, and where PyTorch must differentiate or vmap an operator's formula.

``torch.compile`` does not use these: there the operators stay whole.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _checks, reference
from ._surroundings import differentiated

aten = torch.ops.aten


def trelu_backward(grad: Tensor, y: Tensor) -> Tensor:
    """``grad`` times T-ReLU's derivative, from the output ``y``: 1 where y > 0, 1 - y^2 elsewhere."""
    return torch.where(y > 0, grad, grad * (1 - y * y))


def depthwise_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, mask: Any
) -> tuple[Tensor, ...]:
    """Gradients of image, filter and bias where ``mask`` says so, empty tensors elsewhere."""
    channels = x.shape[1]
    grads = aten.convolution_backward(
        grad, x, weight, [channels], stride, padding, dilation, False, [0, 0], channels, list(mask)
    )
    return tuple(g if m else x.new_empty(0) for g, m in zip(grads, mask, strict=True))


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    inner_activation: int,
    activation: int,
) -> Tensor:
    """The reference function, with activations as operators' numbers."""
    names = _checks.activation_name(inner_activation), _checks.activation_name(activation)
    weights = depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias
    with _as_they_are(x):
        return reference.separable_conv2d(x, *weights, stride, padding, dilation, *names)


def separable_conv2d_backward(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    inner_activation: int,
    activation: int,
    mask: Any,
    groups: int = 1,
) -> tuple[Tensor, ...]:
    """Gradients of image, both filters and both biases where ``mask`` says so, empty tensors elsewhere. ``groups``: the
    groups of the pointwise convolution."""
    inner = _checks.activation_name(inner_activation)
    if y is not None:
        grad = times_derivative(_checks.activation_name(activation), grad, y, y)
    with _as_they_are(x):
        depthwise_out = reference.depthwise_conv2d(x, depthwise_weight, depthwise_bias, stride, padding, dilation)
    wants_depthwise_out = mask[0] or mask[1] or mask[3]
    of_inner, of_pointwise, _ = aten.convolution_backward(
        grad, reference.activate(depthwise_out, inner), pointwise_weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0],
        groups, [wants_depthwise_out, mask[2], False],
    )  # fmt: skip
    of_image = tuple(x.new_empty(0) for _ in range(3))
    if wants_depthwise_out:
        of_depthwise_out = times_derivative(
            inner, of_inner, depthwise_out, reference.trelu(depthwise_out) if inner == "trelu" else depthwise_out
        )
        wanted = [mask[0], mask[1], mask[3]]
        of_image = depthwise_conv2d_backward(of_depthwise_out, x, depthwise_weight, stride, padding, dilation, wanted)
    return (
        *of_image[:2],
        of_pointwise if mask[2] else x.new_empty(0),
        of_image[2],
        grad.sum((0, 2, 3)) if mask[4] else x.new_empty(0),
    )


def _as_they_are(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, since it has already cast the operator's arguments where it was on."""
    kind = x.device.type
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available and torch.is_autocast_enabled(kind) else nullcontext()


def times_derivative(name: str | None, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``grad`` times the derivative of activation ``name`` with input ``x`` and output ``y``. For relu, relu6 and trelu
    both may be the output."""
    if name == "relu":
        return aten.threshold_backward(grad, x, 0)
    if name == "relu6":
        return aten.hardtanh_backward(grad, x, 0, 6)
    if name == "trelu":
        return trelu_backward(grad, y)
    if name == "silu":
        if not torch.is_grad_enabled() and not differentiated():
            return aten.silu_backward(grad, x)
        gate = torch.sigmoid(x)  # written out, since aten.silu_backward is not differentiable
        return grad * gate * (1 + x * (1 - gate))
    return aten.gelu_backward(grad, x) if name == "gelu" else grad


DECOMPOSITIONS = {
    "trelu": reference.trelu,
    "trelu_backward": trelu_backward,
    "depthwise_conv2d": reference.depthwise_conv2d,
    "depthwise_conv2d_backward": depthwise_conv2d_backward,
    "separable_conv2d": separable_conv2d,
    "separable_conv2d_backward": separable_conv2d_backward,
}
