"""The operators in plain PyTorch: the ground truth that every kernel is held against.

Names and signatures are those of the public functions. Any device and floating type is served (float64 for gradcheck);
PyTorch itself differentiates. Nothing here is meant to be fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import Activation, IntPair, Padding


def trelu(x: Tensor, inplace: bool = False) -> Tensor:
    """T-ReLU, equation (6): x where x > 0, tanh(x) elsewhere. NaN stays NaN.

    Args:
        x: any shape, device and floating type.
        inplace: write the result into ``x`` and return ``x``.

    Examples:
        >>> rk.reference.trelu(torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64))
        tensor([-0.7616,  0.0000,  2.0000], dtype=torch.float64)
    """
    # torch.where does not take oneDNN's layout. issubclass rather than isinstance: a stand-in for a tensor, while
    # fuse_for_inference traces a model, refuses to tell its class and layout.
    if issubclass(type(x), Tensor) and x.layout == torch._mkldnn:  # type: ignore[attr-defined]
        y = trelu(x.to_dense()).to_mkldnn()
    else:
        y = torch.where(x > 0, x, torch.tanh(x))
    return x.copy_(y) if inplace else y


def activate(x: Tensor, name: Activation | None) -> Tensor:
    """The named activation of ``x``; ``x`` itself for None.

    Args:
        x: any shape, device and floating type.
        name: "relu", "relu6", "trelu", "silu", "gelu" (erf form) or None.

    Raises:
        KeyError: no such activation; the public functions check the name first.

    Examples:
        >>> rk.reference.activate(torch.tensor([-1.0, 4.0, 8.0]), "relu6")
        tensor([0., 4., 6.])
    """
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
    """Depthwise convolution, equation (3): each channel has one filter or several.

    Equivalent to ``F.conv2d(x, weight, bias, stride, padding, dilation, groups=C)``, which it calls. Arguments are
    those of ``rk.depthwise_conv2d``; complex types are served too.

    Examples:
        >>> rk.reference.depthwise_conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3)).flatten()
        tensor([9., 9.])
    """
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
    """Depthwise then pointwise convolution, equation (5), each with an optional bias and activation.

    Equivalent to two calls of ``F.conv2d``. Arguments as in ``rk.separable_conv2d``; complex types are served too.

    Examples:
        >>> depthwise, pointwise = torch.ones(2, 1, 3, 3), torch.ones(4, 2, 1, 1)
        >>> rk.reference.separable_conv2d(torch.ones(1, 2, 3, 3), depthwise, pointwise).flatten()
        tensor([18., 18., 18., 18.])
    """
    depthwise_out = depthwise_conv2d(x, depthwise_weight, depthwise_bias, stride, padding, dilation)
    hidden = activate(depthwise_out, inner_activation)
    return activate(F.conv2d(hidden, pointwise_weight, pointwise_bias), activation)
