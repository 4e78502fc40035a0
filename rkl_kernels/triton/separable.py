"""Separable convolution in Triton: the depthwise kernel, then the library's matrix product.

The depthwise output is written to memory, but not kept for backward, which computes it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import ops
from .depthwise import depthwise_conv2d, depthwise_conv2d_backward
from .trelu import activate, times_derivative


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) as (pixels, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The library's matrix product of channels and ``weight`` (C', C): (N, C, H, W) to (N, C', H, W), in x's layout.

    It is a matmul and not F.conv2d: matmul obeys torch.backends.cuda.matmul.allow_tf32, and NHWC is one product.
    """
    n, c, h, w = x.shape
    if suggest_memory_format(x) == torch.channels_last:
        y = torch.nn.functional.linear(_rows(x), weight, bias)
        return y.view(n, h, w, weight.shape[0]).permute(0, 3, 1, 2)
    y = torch.matmul(weight, x.reshape(n, c, h * w)).view(n, weight.shape[0], h, w)
    return y if bias is None else y.add_(bias[:, None, None])


def separable_conv2d(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    inner: int,
    activation: int,
) -> Tensor:
    """The kernel of the operator."""
    depthwise_out = depthwise_conv2d(x, depthwise, depthwise_bias, stride, padding, dilation, inner)
    y = activate(_product(depthwise_out, pointwise.flatten(1), pointwise_bias), activation)
    return y.contiguous(memory_format=ops.output_format(x, depthwise))


def separable_conv2d_backward(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    depthwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    inner: int,
    activation: int,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of image, both filters and both biases where ``mask`` says so, empty tensors elsewhere."""
    depthwise_mask = [mask[0], mask[1], mask[3]]
    of_pointwise, of_bias, depthwise_out = (grad.new_empty(0) for _ in range(3))
    if y is not None:
        grad = times_derivative(grad, y, activation, from_output=True)
    if mask[2] or (inner and any(depthwise_mask)):
        depthwise_out = depthwise_conv2d(x, depthwise, depthwise_bias, stride, padding, dilation)
    if mask[2]:
        of_pointwise = (_rows(grad).T @ _rows(activate(depthwise_out, inner))).view_as(pointwise)
    if mask[4]:
        of_bias = grad.sum((0, 2, 3))
    if any(depthwise_mask):
        grad = times_derivative(_product(grad, pointwise.flatten(1).T), depthwise_out, inner, from_output=False)
    dx, dd, ddb = depthwise_conv2d_backward(grad, x, depthwise, stride, padding, dilation, depthwise_mask)
    return dx, dd, of_pointwise, ddb, of_bias
