"""Makes one layer for inference out of a depthwise convolution, norm, activation, pointwise convolution, norm and
activation, or out of any other convolution and the norm after it. A ``SeparableConv2d`` counts as its steps.

In inference a norm with running statistics scales and shifts each channel. Scale and shift are folded into the filter
and the bias of the convolution before the norm, in float64 and rounded once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ._checks import Activation
from ._convert import is_depthwise
from ._surroundings import overrides_functions
from .folded import ActivatedConv2d, ActivatedDepthwiseConv2d
from .layers import DepthwiseConv2d, SeparableConv2d, TReLU, is_altered, is_pointwise, is_single

# By name, so that neither torchvision nor timm has to be imported.
_NORMS = {
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.batchnorm.SyncBatchNorm",
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)
"""Layers that do nothing in inference."""

_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    TReLU: "trelu",
}


C = TypeVar("C", bound=nn.Conv2d)
A = TypeVar("A", ActivatedConv2d, ActivatedDepthwiseConv2d)


@dataclass(frozen=True)
class Affine:
    """A scale and a shift of each channel, in float64.

    Attributes:
        dtype: the only image type that the norm does not change; None where the norm changes no type.
    """

    scale: Tensor
    shift: Tensor
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Fused:
    """A layer for inference that replaces ``modules`` successive modules."""

    layer: nn.Module
    modules: int


def is_norm(module: nn.Module) -> bool:
    """Whether a module's class is one of the norms that are known here. The code of such a norm is never traced."""
    return _class_name(module) in _NORMS


def why_not_first(module: nn.Conv2d) -> str | None:
    """Why a depthwise convolution cannot begin a fused layer; None where it can."""
    if is_altered(module):
        return "it has hooks (pruning and weight norm are such), or a forward of its own"
    if type(module) is ActivatedDepthwiseConv2d:
        return "it is fused with its activation already"
    if type(module) not in (nn.Conv2d, DepthwiseConv2d):
        return f"{type(module).__qualname__} is a subclass of nn.Conv2d and may compute something else"
    if module.out_channels != module.in_channels:
        return f"it has {module.out_channels // module.in_channels} filters a channel"
    if module.weight.is_meta:
        return "its weight has no values on the meta device"
    if overrides_functions(module.weight, module.bias):
        return f"{type(module.weight).__qualname__}, its weight's class, has a __torch_function__ of its own"
    return None


def fuse(modules: Sequence[nn.Module]) -> Fused | None:
    """One layer that replaces the first of these modules, as many as possible; None where nothing is gained.

    Args:
        modules: in the order of their calls, in eval mode; only the next module reads a module's output.
    """
    reader = _Reader(modules)
    first = reader.depthwise()
    if first is None:
        return None
    of_depthwise = reader.affine(first)
    inner = reader.activation()
    pointwise = reader.pointwise()
    layer: nn.Module | None = None
    if pointwise is None and inner:
        layer = _activated(ActivatedDepthwiseConv2d, _depthwise(first, of_depthwise), inner)
    elif pointwise is None:
        layer = _depthwise(first, of_depthwise) if of_depthwise else None
    else:
        of_pointwise = reader.affine(pointwise)
        layer = _separable(first, of_depthwise, inner, pointwise, of_pointwise, reader.activation())
    return _fused(layer, reader)


def fold_norm(modules: Sequence[nn.Module]) -> Fused | None:
    """One convolution that replaces the first of these modules, the norm after it and the activation after the norm;
    None where no norm follows.

    It saves the norm's pass over memory, and on a GPU the pass of the bias or the activation.

    Args:
        modules: in the order of their calls, in eval mode; only the next module reads a module's output.
    """
    reader = _Reader(modules)
    first = reader.dense()
    affine = reader.affine(first) if first else None
    if first is None or affine is None:
        return None
    layer = _with(copy.deepcopy(first), *_folded(first, affine))
    return _fused(_activated(ActivatedConv2d, layer, reader.activation()), reader)


def _fused(layer: nn.Module | None, reader: _Reader) -> Fused | None:
    """The layer, followed by the steps of the last module that it does not include. None where it replaces one module
    only, or where a parameter is not finite (it may overflow in 16 bits)."""
    served, rest = reader.served()
    if layer is None or served == 1 or not all(torch.isfinite(p).all() for p in layer.parameters()):
        return None
    return Fused(nn.Sequential(layer, *rest) if rest else layer, served)


class _Reader:
    """Reads modules as the steps that they do in inference, one after another (see :func:`_steps`). Each method returns
    the next step and goes on, or returns None where the next step is of another kind."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.steps = [(number, step) for number, module in enumerate(modules) for step in _steps(module)]
        self.at = 0

    def _next(self) -> Any:
        return self.steps[self.at][1] if self.at < len(self.steps) else None

    def depthwise(self) -> nn.Conv2d | None:
        step = self._next()
        if not isinstance(step, nn.Conv2d) or not is_depthwise(step) or why_not_first(step):
            return None
        self.at += 1
        return step

    def dense(self) -> nn.Conv2d | None:
        step = self._next()
        if type(step) is not nn.Conv2d or is_altered(step) or not _is_readable(step):
            return None
        self.at += 1
        return step

    def affine(self, conv: nn.Conv2d) -> Affine | None:
        step = self._next()
        if not isinstance(step, Affine) or step.dtype not in (None, conv.weight.dtype):
            return None
        self.at += 1
        return step

    def activation(self) -> Activation | None:
        name = _activation(self._next())
        self.at += name is not None
        return name

    def pointwise(self) -> nn.Conv2d | None:
        step = self._next()
        return self.dense() if isinstance(step, nn.Conv2d) and is_pointwise(step) else None

    def served(self) -> tuple[int, list[nn.Module]]:
        """How many modules have been read, and the steps of the last of them that are left."""
        last = self.steps[self.at - 1][0]
        return last + 1, [step for number, step in self.steps[self.at :] if number == last]


def _is_readable(module: nn.Module) -> bool:
    """Whether a module's tensors have values (none is on meta) and no ``__torch_function__`` of their own."""
    tensors = [*module.parameters(), *module.buffers()]
    return not overrides_functions(*tensors) and not any(tensor.is_meta for tensor in tensors)


def _activation(step: Any) -> Activation | None:
    """The activation of a step: a layer, or the name of a separable convolution's activation. None for other steps."""
    if isinstance(step, str):
        return cast(Activation, step)
    name = _ACTIVATIONS.get(type(step))
    return None if name is None or is_altered(step) or not _has_usual_settings(step) else name


def _has_usual_settings(activation: nn.Module) -> bool:
    """Whether gelu has its erf form, and relu6 its default bounds."""
    bounds = getattr(activation, "min_val", 0), getattr(activation, "max_val", 6)
    return getattr(activation, "approximate", "none") == "none" and bounds == (0, 6)


def _steps(module: nn.Module) -> list[Any]:
    """The steps that a module does in inference. A norm becomes an ``Affine``, and its dropout and activation where it
    has them; a separable convolution its two convolutions and the names of their activations."""
    if is_altered(module):
        return [module]
    if type(module) is SeparableConv2d and is_single(module) and _is_readable(module):
        parts = module.depthwise, module.inner_activation, module.pointwise, module.activation
        return [part for part in parts if part is not None]
    if type(module) in _NOTHING and not module.training:
        return []
    affine = _affine(module) if is_norm(module) else None
    if affine is None:
        return [module]
    inside = [getattr(module, name) for name in ("drop", "act") if hasattr(module, name)]
    return [affine, *(step for part in inside for step in _steps(part))]


def _affine(norm: Any) -> Affine | None:
    """A norm as a scale and a shift. None where it uses the batch's statistics, or these numbers are not finite."""
    if norm.running_mean is None or norm.running_var is None or norm.training or not _is_readable(norm):
        return None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    finite = torch.isfinite(scale).all() and torch.isfinite(shift).all()
    # Frozen norms are plain products and sums, so their output has the wider type of image and statistics.
    dtype = norm.running_var.dtype if "Frozen" in type(norm).__name__ else None
    return Affine(scale, shift, dtype) if finite else None


def _folded(conv: nn.Conv2d, affine: Affine | None) -> tuple[Tensor, Tensor | None]:
    """Copies of a convolution's filter and bias with an affine map folded in, in the convolution's type."""
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    if affine is None:
        return weight.clone(), None if bias is None else bias.clone()
    shift = affine.shift if bias is None else bias.double() * affine.scale + affine.shift
    scaled = weight.double() * affine.scale[:, None, None, None]
    return scaled.to(weight.dtype, memory_format=torch.preserve_format), shift.to(weight.dtype)


def _depthwise(conv: nn.Conv2d, affine: Affine | None) -> DepthwiseConv2d:
    weight, bias = _folded(conv, affine)
    as_it_is: Any = {"padding": conv.padding, "padding_mode": conv.padding_mode}
    layer = DepthwiseConv2d(
        conv.in_channels, conv.kernel_size, conv.stride, dilation=conv.dilation, device="meta", **as_it_is
    )
    layer._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice  # computed when conv was created
    return _with(layer, weight, bias)


def _separable(
    conv: nn.Conv2d,
    of_depthwise: Affine | None,
    inner: Activation | None,
    pointwise: nn.Conv2d,
    of_pointwise: Affine | None,
    activation: Activation | None,
) -> SeparableConv2d:
    layer = SeparableConv2d(
        conv.in_channels, pointwise.out_channels, 1, inner_activation=inner, activation=activation, device="meta"
    )
    layer.depthwise = _depthwise(conv, of_depthwise)
    _with(layer.pointwise, *_folded(pointwise, of_pointwise))
    return layer.eval()


def _with(layer: C, weight: Tensor, bias: Tensor | None) -> C:
    """The layer with these parameters in place of its own, which need no gradient, in eval mode."""
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer.eval()


def _activated(kind: type[A], layer: nn.Conv2d, activation: Activation | None) -> A:
    """The layer with class ``kind`` and an activation. ``kind`` adds no other attribute."""
    layer.__class__ = kind
    activated: Any = layer
    activated.activation = activation
    return activated


def _class_name(module: nn.Module) -> str:
    kind: Any = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"
