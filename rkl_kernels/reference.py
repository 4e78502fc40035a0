"""The operators in plain PyTorch: the ground truth that every kernel is held against.

Same names and signatures as the public functions; any device, any floating type (float64 for gradcheck), autograd by
PyTorch itself. Nothing here is meant to be fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import Activation, IntPair, Padding


def trelu(x: Tensor, inplace: bool = False) -> Tensor:
    """T-ReLU, equation (6): x where x > 0, tanh(x) elsewhere. NaN stays NaN."""
    y = torch.where(x > 0, x, torch.tanh(x))
    return x.copy_(y) if inplace else y


def activate(x: Tensor, name: Activation | None) -> Tensor:
    """The named activation of ``x``; ``x`` itself for None."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "relu6": F.relu6,
        "trelu": trelu,
        "silu": F.silu,
        "gelu": F.gelu,
    }
    return x if name is None else functions[name](x)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
) -> Tensor:
    """Depthwise convolution, equation (3): a filter or more a channel."""
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[-3])


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    inner_activation: Activation | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """Depthwise then pointwise convolution, equation (5), each with an optional bias and activation."""
    inner = activate(depthwise_conv2d(x, depthwise_weight, depthwise_bias, stride, padding, dilation), inner_activation)
    return activate(F.conv2d(inner, pointwise_weight, pointwise_bias), activation)
