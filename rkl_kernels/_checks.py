"""The rules for arguments. Every message names the argument, the rule, the value got and the remedy.

The public functions call these before any backend is chosen, so a wrong call reads the same on every backend.
C++ keeps one guard of its own (csrc/tensor_args.h), so that a direct ``torch.ops.rkl`` call cannot read out of bounds.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ._surroundings import recorded, unrecorded

Activation = Literal["relu", "relu6", "trelu", "silu", "gelu"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
"""The activations' names. An operator takes a name's position here plus one; 0 is no activation (csrc/activation.h)."""

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

CONVOLVED = (*FLOATING, torch.complex64, torch.complex128)
"""Types of a convolution's tensors. Complex types are served by the reference, which calls ``F.conv2d``."""

LARGEST = 2**31 - 1
"""The largest stride, padding or dilation."""

IntPair = int | Sequence[int]
"""Any object with ``__index__`` counts as an integer, NumPy's integers for example."""

Padding = IntPair | Literal["same", "valid"]
"""Zeros around an image: a number of rows and columns, "same" (the image keeps its size) or "valid" (none)."""

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
"""What a layer pads an image with."""


class ArgumentError(ValueError, RuntimeError):
    """An argument with a wrong value. Also a RuntimeError: ``F.conv2d`` raises that type, and programs catch it."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of a wrong type. Also a RuntimeError, as ``F.conv2d`` raises here."""


class Window(NamedTuple):
    """How a filter moves over an image: stride, symmetric padding and dilation, each (height, width).

    ``extra``: rows and columns to pad onto the image's bottom and right first. "same" padding with an even filter is
    asymmetric, and PyTorch puts the odd row and column there. ``multiplied``: each channel has several filters.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    extra: tuple[int, int] = (0, 0)
    multiplied: bool = False

    def pad_extra(self, x: Tensor) -> Tensor:
        """``x`` with the asymmetric part of "same" padding added; ``x`` itself where there is none."""
        return x if self.extra == (0, 0) else F.pad(x, (0, self.extra[1], 0, self.extra[0]))


def floating(name: str, x: object, types: tuple[torch.dtype, ...] = FLOATING) -> None:
    """Check that ``x`` is a tensor of one of ``types``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in types:
        raise ArgumentTypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it with {name}.float()"
        )


def pair(name: str, value: IntPair, least: int) -> list[int]:
    """Check an integer or a pair of integers, each at least ``least``; return [height, width]."""
    if type(value) is int and least <= value <= LARGEST:  # fast paths: small images feel these checks
        return [value, value]
    if type(value) is tuple and len(value) == 2:
        first, second = value
        if type(first) is type(second) is int and least <= first <= LARGEST and least <= second <= LARGEST:
            return [first, second]
    given: list[Any] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    values = [_integer(v) for v in given]
    if len(values) not in (1, 2) or None in values:
        raise ArgumentTypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(values) < least:
        raise ArgumentError(f"{name} must be at least {least}, got {value!r}")
    if max(values) > LARGEST:
        raise ArgumentError(f"{name} must be at most {LARGEST}, got {value!r}")
    return values * 2 if len(values) == 1 else values


def count(name: str, value: int, least: int) -> int:
    """Check one integer, at least ``least``."""
    if _integer(value) is None:
        raise ArgumentTypeError(f"{name} must be an int, got {value!r}")
    return pair(name, value, least)[0]


def _integer(value: Any) -> Any:
    """``value`` as an int or a compiler's SymInt; None for anything else, such as an array of several values."""
    try:
        return value if isinstance(value, torch.SymInt) else operator.index(value)
    except TypeError:
        return None


def unchecked(*window: Any) -> list[tuple[int, int]] | None:
    """Stride, padding and dilation as pairs. The C++ guard checks their values.

    None where one is neither an int nor a pair of ints: PyTorch's own conversion would accept a set or a fraction.
    """
    pairs = []
    for value in window:
        if type(value) is int:
            pairs.append((value, value))
        elif type(value) in (tuple, list) and len(value) == 2 and type(value[0]) is type(value[1]) is int:
            pairs.append((value[0], value[1]))
        else:
            return None
    return pairs


def activation(name: str, value: str | None) -> int:
    """The operator's number for an activation's name; 0 for None."""
    if value is None:
        return 0
    if value not in ACTIVATIONS:
        raise ValueError(f"{name} must be None or one of {', '.join(ACTIVATIONS)}, got {value!r}")
    return ACTIVATIONS.index(value) + 1


def activation_name(number: int) -> Activation | None:
    """The activation's name for an operator's number; None for 0."""
    return ACTIVATIONS[number - 1] if number else None


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: IntPair, padding: Padding, dilation: IntPair
) -> Window:
    """Check the arguments of a depthwise convolution against each other and return its window."""
    if recorded():
        with unrecorded():
            return depthwise(x, weight, bias, stride, padding, dilation)
    floating("x", x, CONVOLVED)
    window = _window(x, weight, stride, padding, dilation, "weight", may_multiply=True)
    if bias is not None:
        _bias("bias", bias, weight.shape[0], x)
    return window


def separable(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: IntPair,
    padding: Padding,
    dilation: IntPair,
) -> Window:
    """Check the arguments of a separable convolution against each other and return its depthwise window."""
    if recorded():
        weights = depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias
        with unrecorded():
            return separable(x, *weights, stride, padding, dilation)
    floating("x", x, CONVOLVED)
    window = _window(x, depthwise_weight, stride, padding, dilation, "depthwise_weight")
    _pointwise(pointwise_weight, x)
    if depthwise_bias is not None:
        _bias("depthwise_bias", depthwise_bias, depthwise_weight.shape[0], x)
    if pointwise_bias is not None:
        _bias("pointwise_bias", pointwise_bias, pointwise_weight.shape[0], x)
    return window


def _window(
    x: Tensor,
    weight: Tensor,
    stride: IntPair,
    padding: Padding,
    dilation: IntPair,
    name: str,
    may_multiply: bool = False,
) -> Window:
    """Check image and depthwise filter against each other; turn "same" and "valid" padding into pixels.

    ``may_multiply``: every channel may have several filters, the same number for each.
    """
    _same_kind(x, name, weight)
    image, taps = x.shape, weight.shape
    if len(image) not in (3, 4):
        raise ArgumentError(f"x must have shape (N, C, H, W) or (C, H, W), got {tuple(image)}")
    channels, height, width = image[-3:]
    multiplied = False
    if len(taps) != 4 or taps[1] != 1 or taps[0] != channels:
        multiplied = may_multiply and len(taps) == 4 and taps[1] == 1 and taps[0] > 0 < channels
        if not multiplied or taps[0] % channels:
            raise ArgumentError(
                f"{name} must have shape (C, 1, kh, kw) with C = {channels}, the channels of x"
                f"{', or a multiple of it' if may_multiply else ''}, got {tuple(taps)}"
            )
    if channels < 1:
        raise ArgumentError(f"x must have at least one channel, got shape {tuple(image)}")
    kernel_h, kernel_w = taps[2:]
    if kernel_h < 1 or kernel_w < 1:
        raise ArgumentError(f"{name} must be at least 1 x 1 in space, got {tuple(taps)}")
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    extra = (0, 0)
    span = [dilation[0] * (kernel_h - 1), dilation[1] * (kernel_w - 1)]
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ArgumentError(f"padding must be 'same', 'valid', an int or a pair of ints, got {padding!r}")
        if padding == "same" and stride != [1, 1]:
            raise ArgumentError(f"padding='same' needs stride 1, got stride {stride}; give the padding in pixels")
        same = padding == "same"
        padding = [s // 2 for s in span] if same else [0, 0]
        extra = (span[0] % 2, span[1] % 2) if same else (0, 0)
    else:
        padding = pair("padding", padding, 0)
    if height + extra[0] + 2 * padding[0] <= span[0] or width + extra[1] + 2 * padding[1] <= span[1]:
        raise ArgumentError(
            f"the dilated filter ({span[0] + 1} x {span[1] + 1}) must fit into the padded image, got "
            f"{height} x {width} padded by {padding}; use a larger padding or a smaller {name}"
        )
    if not height * width and (len(image) == 3 or image[0]):
        raise ArgumentError(f"x must have at least one pixel, got shape {tuple(image)}; leave such images out")
    return Window(stride, padding, dilation, extra, multiplied)


def _same_kind(x: Tensor, name: str, other: Tensor) -> None:
    """Check that the other tensor has the device and the type of ``x``."""
    if not isinstance(other, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(other).__name__}")
    if other.device != x.device:
        raise ArgumentError(f"{name} must be on the device of x, {x.device}, got {other.device}; move it there first")
    if other.dtype != x.dtype:
        raise ArgumentTypeError(f"{name} must have the type of x, {x.dtype}, got {other.dtype}; convert one of them")


def _bias(name: str, value: Tensor, channels: int, x: Tensor) -> None:
    """Check that a bias has one value for each output channel."""
    _same_kind(x, name, value)
    if value.shape != (channels,):
        raise ArgumentError(f"{name} must have shape ({channels},), one value a channel, got {tuple(value.shape)}")


def _pointwise(weight: Tensor, x: Tensor) -> None:
    """Check that ``weight`` is a 1 x 1 filter over the channels of ``x``."""
    _same_kind(x, "pointwise_weight", weight)
    channels = x.shape[-3]
    if weight.dim() != 4 or weight.shape[0] < 1 or weight.shape[1:] != (channels, 1, 1):
        raise ArgumentError(
            f"pointwise_weight must have shape (C_out, C, 1, 1) with C = {channels}, the channels of x, and C_out at "
            f"least 1, got {tuple(weight.shape)}"
        )
