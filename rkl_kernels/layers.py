"""Drop-in layers over the public functions; parameters and initial values as in ``torch.nn``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _checks
from ._checks import IntPair
from .depthwise import depthwise_conv2d
from .separable import separable_conv2d
from .trelu import trelu


class TReLU(nn.Module):
    """T-ReLU (equation 6) as a layer: drop-in for ``nn.ReLU``."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return trelu(x, self.inplace)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution as a layer: equivalent to ``nn.Conv2d(channels, channels, kernel_size, groups=channels)``.

    It is an ``nn.Conv2d``, with its attributes, initial values and state_dict keys, so tools that look for one (weight
    decay filters, pruning, converters) go on working.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair | str = 0,
        dilation: IntPair = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            channels,
            channels,
            tuple(_checks.pair("kernel_size", kernel_size, 1)),  # type: ignore[arg-type]
            tuple(_checks.pair("stride", stride, 1)),  # type: ignore[arg-type]
            padding if isinstance(padding, str) else tuple(_checks.pair("padding", padding, 0)),  # type: ignore[arg-type]
            tuple(_checks.pair("dilation", dilation, 1)),  # type: ignore[arg-type]
            groups=channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)


class SeparableConv2d(nn.Module):
    """Depthwise, then pointwise convolution in one kernel where that pays (equation 5).

    Equivalent to ``nn.Sequential(nn.Conv2d(c_in, c_in, kernel_size, groups=c_in), nn.Conv2d(c_in, c_out, 1))`` with
    the activations between and after. Parameters: ``depthwise.weight``, ``pointwise.weight`` and their biases.

    Args:
        c_in, c_out: channels before and after.
        kernel_size, stride, padding, dilation: of the depthwise step.
        bias: a bias after the pointwise step; the depthwise step has one only with ``depthwise_bias=True``.
        inner_activation, activation: names as in :func:`rkl_kernels.separable_conv2d`.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair | str = 0,
        dilation: IntPair = 1,
        bias: bool = True,
        depthwise_bias: bool = False,
        inner_activation: str | None = None,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.activation("inner_activation", inner_activation)
        _checks.activation("activation", activation)
        self.depthwise = DepthwiseConv2d(
            c_in, kernel_size, stride, padding, dilation, bias=depthwise_bias, device=device, dtype=dtype
        )
        self.pointwise = nn.Conv2d(c_in, c_out, 1, bias=bias, device=device, dtype=dtype)
        self.inner_activation = inner_activation
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return separable_layers(x, self.depthwise, self.pointwise, self.inner_activation, self.activation)

    def extra_repr(self) -> str:
        return f"inner_activation={self.inner_activation}, activation={self.activation}"


def separable_layers(
    x: Tensor,
    depthwise: nn.Conv2d,
    pointwise: nn.Conv2d,
    inner_activation: str | None = None,
    activation: str | None = None,
) -> Tensor:
    """The two layers' parameters through one call of :func:`rkl_kernels.separable_conv2d`."""
    return separable_conv2d(
        x,
        depthwise.weight,
        pointwise.weight,
        depthwise.bias,
        pointwise.bias,
        depthwise.stride,
        depthwise.padding,
        depthwise.dilation,
        inner_activation,
        activation,
    )
