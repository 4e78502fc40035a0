"""FLOP formulas for ``torch.utils.flop_counter``. They count the operators as it counts PyTorch's own convolutions, and
T-ReLU, like ReLU, as nothing. What a backward computes again is not counted, so that the count does not depend on how
a kernel works."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch


def _depthwise(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight_shape[1:])


def _depthwise_backward(
    grad_shape: Sequence[int],
    x_shape: Any,
    weight_shape: Sequence[int],
    *settings: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    return sum(settings[-1][:2]) * 2 * prod(grad_shape) * prod(weight_shape[1:])


def _separable(
    x_shape: Any, depthwise: Sequence[int], pointwise: Sequence[int], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    pixels = out_shape[0] * prod(out_shape[2:])
    return 2 * pixels * (prod(depthwise) + prod(pointwise))


def _separable_backward(
    grad_shape: Sequence[int], y_shape: Any, x_shape: Any, depthwise: Any, pointwise: Any, *settings: Any, **_: Any
) -> int:
    mask, pixels = settings[-1], grad_shape[0] * prod(grad_shape[2:])
    depthwise_grads = mask[0] + mask[1]
    pointwise_grads = (mask[0] or mask[1] or mask[3]) + mask[2]
    return 2 * pixels * (depthwise_grads * prod(depthwise) + pointwise_grads * prod(pointwise))


FORMULAS = {
    "depthwise_conv2d": _depthwise,
    "depthwise_conv2d_backward": _depthwise_backward,
    "separable_conv2d": _separable,
    "separable_conv2d_backward": _separable_backward,
}
"""The formula of each operator. ``register_flop_formula`` passes the operator's arguments, each tensor as its shape."""


def register(packets: Any) -> None:
    """Register a namespace's operators with ``torch.utils.flop_counter``, which must already be imported."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas = {getattr(packets, name): formula for name, formula in FORMULAS.items()}
    formulas[torch.ops.aten.convolution_backward_overrideable] = _depthwise_backward  # the gradient of a plain call
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            declare: Any = register_flop_formula(operator)
            declare(formula)
