"""Depthwise-separable convolution, equation (5)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, reference
from ._autocast import autocast
from ._checks import IntPair
from .backends import namespace_for

INVERTIBLE = ("relu", "relu6", "trelu")
"""Activations whose gradient can be told from their output, so that no pre-activation need be kept."""


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    inner_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """Depthwise, then pointwise convolution, each with an optional bias and activation (equation 5).

    Equivalent to ``act(F.conv2d(inner_act(F.conv2d(x, depthwise_weight, depthwise_bias, stride, padding, dilation,
    groups=C)), pointwise_weight, pointwise_bias))``. The depthwise output is not kept for backward: it is made again.

    Args:
        x: (N, C, H, W) or (C, H, W); contiguous, channels_last or any other strides.
        depthwise_weight: (C, 1, kh, kw).
        pointwise_weight: (C', C, 1, 1).
        depthwise_bias, pointwise_bias: (C,) and (C',), or None.
        stride, padding, dilation: of the depthwise step, as in :func:`depthwise_conv2d`.
        inner_activation, activation: after the depthwise and after the pointwise step; "relu", "relu6", "trelu",
            "silu", "gelu" (erf form) or None.

    Returns:
        (N, C', H', W') in the memory format that ``F.conv2d`` gives.

    Raises:
        TypeError: an argument has a type that is not served.
        ValueError: shapes, devices, the window or an activation's name do not fit.
    """
    x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias = autocast(
        x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias
    )
    window = _checks.window(x, depthwise_weight, stride, padding, dilation, "depthwise_weight")
    _checks.pointwise(pointwise_weight, x)
    _checks.bias("depthwise_bias", depthwise_bias, x.shape[-3], x)
    _checks.bias("pointwise_bias", pointwise_bias, pointwise_weight.shape[0], x)
    inner, outer = (
        _checks.activation("inner_activation", inner_activation),
        _checks.activation("activation", activation),
    )
    operators = namespace_for("separable_conv2d", x)
    weights = (depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    if operators is None:
        return reference.separable_conv2d(x, *weights, stride, padding, dilation, inner_activation, activation)
    # Backward needs the pre-activation of silu and gelu: there the activation stands outside, and autograd keeps it.
    outside = activation not in INVERTIBLE and activation is not None and torch.is_grad_enabled()
    batched = window.pad_extra(x if x.dim() == 4 else x[None])
    y = operators.separable_conv2d(
        batched, *weights, window.stride, window.padding, window.dilation, inner, 0 if outside else outer
    )
    y = reference.activate(y, activation) if outside else y
    return y if x.dim() == 4 else y[0]
