"""Drop-in layers that call the public functions. Parameters and initial values are those of ``torch.nn``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import _checks, reference
from ._checks import Activation, IntPair, Padding, PaddingMode
from ._surroundings import overrides_functions, recorded, unrecorded
from ._trelu import trelu
from .depthwise import depthwise_conv2d
from .separable import separable_conv2d


class TReLU(nn.Module):
    """T-ReLU (equation 6) as a layer: drop-in for ``nn.ReLU``, any shape to the same shape.

    Equivalent to a module that calls ``rk.trelu``. It has no parameters.

    Args:
        inplace: write the result into the input.

    Examples:
        >>> rk.TReLU()(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([-0.7616,  0.0000,  2.0000])
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        return trelu(input, self.inplace)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution as a layer, (N, C, H, W) to (N, m C, H', W') with m filters a channel.

    Equivalent to ``nn.Conv2d(channels, multiplier * channels, kernel_size, groups=channels)``. It is an ``nn.Conv2d``,
    with its attributes, initial values and state_dict keys, so tools that look for ``nn.Conv2d`` (weight decay filters,
    pruning, converters) still work. With a ``multiplier`` above 1 PyTorch's own convolution serves it on every device.

    Args:
        channels: C.
        kernel_size: taps of the filter, an int or (height, width).
        stride: as in ``rk.depthwise_conv2d``.
        padding: as in ``rk.depthwise_conv2d``.
        dilation: as in ``rk.depthwise_conv2d``.
        bias: whether a bias is added, one value for each output channel.
        padding_mode: what the image is padded with. "reflect", "replicate" and "circular" pad it before the kernel.
        multiplier: m, the filters a channel.
        device: where the parameters are made.
        dtype: their type.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is too small, or there is no such ``padding_mode``.

    Examples:
        >>> layer = rk.DepthwiseConv2d(8, 3, padding=1)
        >>> layer(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
        >>> isinstance(layer, nn.Conv2d), list(layer.state_dict())
        (True, ['weight', 'bias'])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Padding = 0,
        dilation: IntPair = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        multiplier: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        channels = _checks.count("channels", channels, 1)
        super().__init__(
            channels,
            channels * _checks.count("multiplier", multiplier, 1),
            tuple(_checks.pair("kernel_size", kernel_size, 1)),  # type: ignore[arg-type]
            tuple(_checks.pair("stride", stride, 1)),  # type: ignore[arg-type]
            padding if isinstance(padding, str) else tuple(_checks.pair("padding", padding, 0)),  # type: ignore[arg-type]
            tuple(_checks.pair("dilation", dilation, 1)),  # type: ignore[arg-type]
            groups=channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        replaced = _is_conv_replaced(self) or overrides_functions(input, weight, bias)
        if replaced or self.groups != self.in_channels or _is_for_others(input, self):
            return super().forward(input)  # it may pad another way, or refuse the image
        image, padding = padded(input, self)
        return depthwise_conv2d(image, weight, bias, self.stride, padding, self.dilation)


class SeparableConv2d(nn.Module):
    """Depthwise, then pointwise convolution in one kernel where that pays (equation 5).

    Equivalent to ``nn.Sequential(nn.Conv2d(c_in, c_in, kernel_size, groups=c_in), nn.Conv2d(c_in, c_out, 1))`` with
    the activations between and after; (N, c_in, H, W) to (N, c_out, H', W'). Parameters: ``depthwise.weight``,
    ``pointwise.weight`` and their biases. Where a step was replaced, pruned, hooked or parametrized, the two steps are
    called as modules, one after the other.

    Args:
        c_in: channels before.
        c_out: channels after.
        kernel_size: taps of the depthwise filter, an int or (height, width).
        stride: of the depthwise step, as in ``rk.depthwise_conv2d``.
        padding: of the depthwise step, as in ``rk.depthwise_conv2d``.
        dilation: of the depthwise step, as in ``rk.depthwise_conv2d``.
        bias: whether a bias is added after the pointwise step.
        depthwise_bias: whether a bias is added after the depthwise step.
        inner_activation: after the depthwise step, a name as in ``rk.separable_conv2d``.
        activation: after the pointwise step, a name as in ``rk.separable_conv2d``.
        padding_mode: as in ``rk.DepthwiseConv2d``.
        device: where the parameters are made.
        dtype: their type.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is too small, or there is no such activation or ``padding_mode``.

    Examples:
        >>> layer = rk.SeparableConv2d(8, 16, 3, stride=2, inner_activation="relu6")
        >>> layer(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 16, 2, 2])
        >>> list(layer.state_dict())
        ['depthwise.weight', 'pointwise.weight', 'pointwise.bias']
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: Padding = 0,
        dilation: IntPair = 1,
        bias: bool = True,
        depthwise_bias: bool = False,
        inner_activation: Activation | None = None,
        activation: Activation | None = None,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        c_in, c_out = _checks.count("c_in", c_in, 1), _checks.count("c_out", c_out, 0)
        _checks.activation("inner_activation", inner_activation)
        _checks.activation("activation", activation)
        self.depthwise = DepthwiseConv2d(
            c_in, kernel_size, stride, padding, dilation, depthwise_bias, padding_mode, device=device, dtype=dtype
        )
        self.pointwise = nn.Conv2d(c_in, c_out, 1, bias=bias, device=device, dtype=dtype)
        self.inner_activation = inner_activation
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        depthwise, pointwise, single = self.depthwise, self.pointwise, is_single(self)
        weights: list[Any] = [depthwise.weight, pointwise.weight, depthwise.bias, pointwise.bias] if single else []
        if not single or overrides_functions(input, *weights):
            depthwise_out = activated(depthwise(input), self.inner_activation)
            return activated(pointwise(depthwise_out), self.activation)
        image, padding = padded(input, depthwise)
        settings: list[Any] = [depthwise.stride, padding, depthwise.dilation, self.inner_activation, self.activation]
        return separable_conv2d(image, *weights, *settings)

    def extra_repr(self) -> str:
        return f"inner_activation={self.inner_activation}, activation={self.activation}"


def is_altered(module: nn.Module) -> bool:
    """Whether a call of the module may differ from its class: it has hooks, or its forward was replaced."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a layer's forward was replaced on the object or, for a convolution, anything that its forward calls."""
    return "forward" in vars(module) or (isinstance(module, nn.Conv2d) and _is_conv_replaced(module))


_CONV_FORWARD, _INNER_FORWARD, _CONV2D = nn.Conv2d.forward, nn.Conv2d._conv_forward, F.conv2d
"""PyTorch's own methods and the function below them, as they were when this module was imported."""


def _is_conv_replaced(conv: nn.Conv2d) -> bool:
    """Whether anything that ``nn.Conv2d.forward`` calls was replaced: a method (on the object, in a subclass or in
    PyTorch's class) or ``F.conv2d``. Programs that emulate number formats or count operations do that."""
    inner, forward = type(conv)._conv_forward, nn.Conv2d.forward
    is_own = "_conv_forward" in vars(conv) or inner is not _INNER_FORWARD or forward is not _CONV_FORWARD
    return is_own or F.conv2d is not _CONV2D


def _is_for_others(x: Any, conv: nn.Conv2d) -> bool:
    """Whether an image has another number of channels than the layer. ``depthwise_conv2d`` could take that for several
    filters a channel, where ``nn.Conv2d`` raises an error."""
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        return False
    channels = x.shape[-3]
    if type(channels) is not int and recorded():  # slow, so second: sizes are tensors then
        with unrecorded():
            channels = x.shape[-3]
    return channels != conv.groups


def _has_one_filter(module: nn.Module) -> bool:
    """Whether a module is a plain depthwise layer with one filter a channel."""
    return _is_plain(module, DepthwiseConv2d) and module.out_channels == module.in_channels == module.groups


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is PyTorch's own 1 x 1 convolution, plain, dense and without stride or padding."""
    if not _is_plain(module, nn.Conv2d):
        return False
    window: Any = module.kernel_size, module.stride, module.groups
    return window == ((1, 1), (1, 1), 1) and module.padding in ((0, 0), "same", "valid")


def is_single(separable: SeparableConv2d) -> bool:
    """Whether both steps are plain layers, so that one operator can serve them."""
    return not _has_any_global_hook() and _has_one_filter(separable.depthwise) and is_pointwise(separable.pointwise)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module has exactly this class, and a call does what the class says."""
    return type(module) is kind and not is_altered(module)


def activated(x: Tensor, name: Activation | None) -> Tensor:
    """The named activation of ``x``. T-ReLU is served by the kernels, the others by PyTorch."""
    return trelu(x) if name == "trelu" else reference.activate(x, name)


def padded(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, Any]:
    """The image and the zero padding that is left to the kernel. Other padding modes are applied to the image here."""
    if conv.padding_mode == "zeros":
        return x, conv.padding
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
