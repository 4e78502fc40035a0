"""Layers that :mod:`rkl_kernels.fold` makes for inference: a convolution with a norm in its filter and the activation
behind it.

In a plain call without gradients, bias and activation take no pass over memory of their own, or one for both. PyTorch's
own operators on a GPU take two: 4.1 of the 7.3 ms of a MobileNetV2 (256 images of 224 px, bf16, H100). In other calls
each layer calls PyTorch's convolution, or this package's, and then its activation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks
from ._backends import is_built, is_served
from ._checks import Activation
from ._surroundings import is_plain
from ._trelu import trelu
from .layers import DepthwiseConv2d, activated, padded
from .ops import rkl


class ActivatedConv2d(nn.Conv2d):
    """PyTorch's convolution and an activation.

    Equivalent to ``nn.Sequential(nn.Conv2d(...), activation)``.

    Attributes:
        activation: a name as in ``rk.separable_conv2d``, or None.
    """

    activation: Activation | None = None

    def forward(self, input: Tensor) -> Tensor:
        image, padding = padded(input, self)
        window = _checks.unchecked(self.stride, padding, self.dilation)
        if not (window and _is_inference(image, self) and is_built(image)):
            return activate_in_place(super().forward(input), self.activation)
        code = _checks.activation("activation", self.activation)
        return rkl.conv2d_activated(image, self.weight, self.bias, *window, self.groups, code)


class ActivatedDepthwiseConv2d(DepthwiseConv2d):
    """A depthwise convolution and an activation, in one kernel.

    Equivalent to ``nn.Sequential(rk.DepthwiseConv2d(...), activation)``.

    Attributes:
        activation: a name as in ``rk.separable_conv2d``.
    """

    activation: Activation | None = None

    def forward(self, input: Tensor) -> Tensor:
        image, padding = padded(input, self)
        window = _checks.unchecked(self.stride, padding, self.dilation)
        if not (window and _is_inference(image, self) and is_served(image, self.weight)):
            return activate_in_place(super().forward(input), self.activation)
        code = _checks.activation("activation", self.activation)
        return rkl.depthwise_conv2d_activated(image, self.weight, self.bias, *window, code)


def _is_inference(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a call is plain, its image has four dimensions and the filter's type, and no gradient is wanted."""
    # is_plain() comes first: it is False under a compiler, which cannot trace _any_requires_grad().
    if not (x.dim() == 4 and x.dtype == conv.weight.dtype and is_plain(x, conv.weight, conv.bias)):
        return False
    return not (torch.is_grad_enabled() and torch._C._any_requires_grad(x, conv.weight, conv.bias))


def activate_in_place(x: Tensor, name: Activation | None) -> Tensor:
    """The activation of ``x``, which nobody else reads. In place where no gradient needs ``x`` and PyTorch can."""
    if x.requires_grad or name in (None, "gelu"):
        return activated(x, name)
    if name == "trelu":
        return trelu(x, True)
    return {"relu": F.relu, "relu6": F.relu6, "silu": F.silu}[name](x, inplace=True)
