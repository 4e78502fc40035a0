"""The separable operator as depthwise kernel and library product, for shapes where one kernel for both would lose.

The depthwise output exists in memory here, but is still not kept from forward to backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .depthwise import depthwise_conv2d
from .trelu import activate, times_slope

Window = tuple[Sequence[int], Sequence[int], Sequence[int]]


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The library's product over channels with ``weight`` (C', C): (N, C, H, W) to (N, C', H, W), in the same layout.

    matmul rather than F.conv2d: it obeys torch.backends.cuda.matmul.allow_tf32, and NHWC makes it one product.
    """
    n, c, h, w = x.shape
    if suggest_memory_format(x) == torch.channels_last:
        y = torch.nn.functional.linear(_rows(x), weight, bias)
        return y.view(n, h, w, -1).permute(0, 3, 1, 2)
    y = torch.matmul(weight, x.reshape(n, c, h * w)).view(n, -1, h, w)
    return y if bias is None else y.add_(bias[:, None, None])


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) as (pixels, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def forward(
    x: Tensor,
    depthwise: Tensor,
    weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    window: Window,
    inner: int,
    activation: int,
) -> Tensor:
    """The operator's output."""
    middle = depthwise_conv2d(x, depthwise, depthwise_bias, *window, activation=inner)
    return activate(pointwise(middle, weight, pointwise_bias), activation)


def backward(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    depthwise: Tensor,
    weight: Tensor,
    depthwise_bias: Tensor | None,
    window: Window,
    inner: int,
    activation: int,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the depthwise output (before its activation), of ``weight`` (C', C) and of the pointwise bias, each
    where ``mask`` says so."""
    if y is not None:
        grad = times_slope(grad, y, activation, from_output=True)
    middle: Any = None
    if mask[1] or (mask[0] and inner):
        middle = depthwise_conv2d(x, depthwise, depthwise_bias, *window)
    of_weight = _rows(grad).T @ _rows(activate(middle, inner)) if mask[1] else None
    of_bias = grad.sum((0, 2, 3)) if mask[2] else None
    of_middle = times_slope(pointwise(grad, weight.T), middle, inner, from_output=False) if mask[0] else None
    return of_middle, of_weight, of_bias
