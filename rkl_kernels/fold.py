"""Depthwise convolution, batch norm, activation, pointwise convolution: one separable convolution in inference.

The four stay registered modules with their own parameters and state_dict keys. In inference the first of them does the
work of all, with the norm's scale and shift in the depthwise filter and bias, and the others pass their input on; in
training, and wherever gradients are recorded, each does its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._surroundings import recorded
from .layers import DepthwiseConv2d, TReLU
from .separable import separable_conv2d


class FoldingDepthwise(DepthwiseConv2d):
    """The depthwise convolution. The modules after it stand in a tuple, which registers nothing."""

    after: tuple[nn.BatchNorm2d, nn.Conv2d]
    inner_activation: str | None

    def folds(self, x: Tensor) -> bool:
        """Whether this call is served in one; on CPUs, where it was measured. A traced program has every step, since it
        is to serve in every mode."""
        if not isinstance(x, Tensor) or recorded():
            return False
        return x.device.type == "cpu" and not self.after[0].training and not torch.is_grad_enabled()

    def forward(self, x: Tensor) -> Tensor:
        if not self.folds(x):
            return super().forward(x)
        norm, pointwise = self.after
        assert norm.running_mean is not None  # foldable() asked
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean if self.bias is None else self.bias - norm.running_mean
        bias = shift * scale if norm.bias is None else shift * scale + norm.bias
        weight = (self.weight * scale[:, None, None, None]).to(self.weight.dtype)
        return separable_conv2d(
            x,
            weight,
            pointwise.weight,
            bias.to(weight.dtype),
            pointwise.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.inner_activation,
        )


class _Passes:
    """A module whose work the depthwise convolution before it has done, in inference."""

    first: tuple[FoldingDepthwise]

    def forward(self, x: Tensor) -> Any:
        return x if self.first[0].folds(x) else super().forward(x)  # type: ignore[misc]


class _BatchNorm2d(_Passes, nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        if isinstance(input, Tensor):  # torch.fx passes what only stands for one
            super()._check_input_dim(input)


class _Conv2d(_Passes, nn.Conv2d):
    pass


class _ReLU(_Passes, nn.ReLU):
    pass


class _ReLU6(_Passes, nn.ReLU6):
    pass


class _SiLU(_Passes, nn.SiLU):
    pass


class _TReLU(_Passes, TReLU):
    pass


_PASSING: dict[type[nn.Module], tuple[type[nn.Module], str | None]] = {
    nn.BatchNorm2d: (_BatchNorm2d, None),
    nn.Conv2d: (_Conv2d, None),
    nn.ReLU: (_ReLU, "relu"),
    nn.ReLU6: (_ReLU6, "relu6"),
    nn.SiLU: (_SiLU, "silu"),
    TReLU: (_TReLU, "trelu"),
}
"""A module's class when it passes its input on, and the activation's name."""


def foldable(modules: list[nn.Module]) -> bool:
    """Whether these, in a row, are a convolution, a batch norm with running statistics, perhaps an activation, and a
    convolution; the convolutions' shapes are the caller's to check."""
    kinds = [type(module) for module in modules]
    if len(kinds) not in (3, 4) or (kinds[0], kinds[1], kinds[-1]) != (nn.Conv2d, nn.BatchNorm2d, nn.Conv2d):
        return False
    if len(kinds) == 4 and (kinds[2] not in _PASSING or _PASSING[kinds[2]][1] is None):
        return False
    return getattr(modules[1], "running_mean", None) is not None


def fold(modules: list[nn.Module]) -> None:
    """Give them their classes, in place."""
    first, norm, *activations, last = modules
    names = [_PASSING[type(module)][1] for module in activations]
    first.__class__ = FoldingDepthwise
    first.after, first.inner_activation = (norm, last), names[0] if names else None  # type: ignore[assignment]
    for module in modules[1:]:
        module.__class__ = _PASSING[type(module)][0]
        module.first = (first,)  # type: ignore[assignment]
