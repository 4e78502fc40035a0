"""Swap the layers of an existing model for this package's, in place, and back.

A swap changes a module's class and nothing else. The module stays the same object wherever it is used, with its
parameters, keys, hooks and mode. Whether a layer is swapped depends on the layer alone, never on how the model calls
it. So nothing that a model does in a call, or that is done to the model later, can make a swap wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.nn.utils import parametrize

from .layers import DepthwiseConv2d, TReLU, has_own_forward

_WAS = "_rkl_was"
"""The attribute in which a swapped module keeps its former class."""

_NESTED = "_rkl_use_nested_tensor"
"""The attribute in which an ``nn.TransformerEncoder`` with swapped modules keeps its former ``use_nested_tensor``."""


@dataclass
class Conversion:
    """What ``rk.convert`` did; print it.

    Attributes:
        depthwise: names of the depthwise convolutions that were swapped.
        activations: names of the activations that were replaced.
        left: names of the depthwise convolutions that stay PyTorch's, each with the reason.

    Examples:
        >>> report = rk.convert(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=8)))
        >>> report.depthwise, report.left
        (['0'], {'1': '2 filters a channel; one is served by kernels'})
    """

    depthwise: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = f"depthwise convolutions swapped: {len(self.depthwise)}; activations replaced: {len(self.activations)}"
        return "\n".join([done, *(f"left {name}: {why}" for name, why in self.left.items())])


def convert(model: nn.Module, activation: Literal["trelu"] | None = None) -> Conversion:
    """Swap a model's depthwise convolutions for ``rk.DepthwiseConv2d``, in place.

    Equivalent to the model as it was, but for speed and rounding, in training and in inference. Parameters,
    state_dict keys and hooks stay the same; a swapped layer is the same object with another class. Converting twice
    has no further effect. ``rk.restore`` undoes a conversion. To fuse a whole chain of layers for inference, see
    ``rk.fuse_for_inference``.

    Args:
        model: any module; it may be a layer itself. Its submodules are searched at every depth.
        activation: "trelu" to replace every ``nn.ReLU`` too, which changes what the model computes; None leaves them.

    Returns:
        The report of what was swapped, and of the depthwise convolutions that were left, each with the reason.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``activation`` is neither None nor "trelu".

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> print(rk.convert(model))
        depthwise convolutions swapped: 1; activations replaced: 0
        >>> type(model[0]) is rk.DepthwiseConv2d, list(model.state_dict())
        (True, ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    check_module(model)
    if activation not in (None, "trelu"):
        raise ValueError(f"activation must be None or 'trelu', got {activation!r}")
    report = Conversion()
    swapped: set[nn.Module] = set()
    for name, module in model.named_modules():
        if activation and type(module) is nn.ReLU and not has_own_forward(module):
            _swap(module, TReLU)
            swapped.add(module)
            report.activations.append(name)
        elif isinstance(module, nn.Conv2d) and is_depthwise(module) and not isinstance(module, DepthwiseConv2d):
            why = _why_left(module)
            if why:
                report.left[name] = why
            else:
                _swap(module, DepthwiseConv2d)
                report.depthwise.append(name)
        elif isinstance(module, nn.LazyConv2d) and module.groups > 1:
            report.left[name] = "its channels are known only after its first call; convert it again then"
    _tell_transformers(model, swapped)
    return report


def restore(model: nn.Module) -> list[str]:
    """Undo ``rk.convert``, in place: every module that it swapped gets its former class back.

    The modules stay the same objects and keep their present parameters, keys and hooks. Layers that were created as
    this package's keep their class. Restoring twice has no further effect.

    Args:
        model: a module that was converted, a copy of one, or a module that contains one.

    Returns:
        The names of the modules that were restored.

    Raises:
        TypeError: ``model`` is no module.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
        >>> report = rk.convert(model)
        >>> rk.restore(model), type(model[0])
        (['0'], <class 'torch.nn.modules.conv.Conv2d'>)
    """
    check_module(model)
    swapped = {name: module for name, module in model.named_modules() if _WAS in vars(module)}
    for module in swapped.values():
        ours = DepthwiseConv2d if isinstance(module, DepthwiseConv2d) else TReLU
        _give_class(module, ours, vars(module).pop(_WAS))
    _tell_transformers(model, set(swapped.values()))
    return list(swapped)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether each input channel has its own filters. One channel does not count: there our kernels gain nothing."""
    return conv.groups == conv.in_channels > 1


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _why_left(conv: nn.Conv2d) -> str | None:
    """Why a depthwise convolution stays as it is; None where it can be swapped."""
    if has_own_forward(conv):
        return "its forward, or what that calls, was replaced"
    kind: Any = parametrize.type_before_parametrizations(conv)
    if kind is not nn.Conv2d:
        return f"{kind.__module__}.{kind.__qualname__} is a subclass of nn.Conv2d and may compute something else"
    if conv.out_channels != conv.in_channels:
        return f"{conv.out_channels // conv.in_channels} filters a channel; one is served by kernels"
    return None


def _tell_transformers(model: nn.Module, swapped: set[nn.Module]) -> None:
    """Update what transformers recorded when they were created. An ``nn.TransformerEncoderLayer`` records that its
    activation is relu, and its fast path for inference then computes relu itself. An ``nn.TransformerEncoder`` records
    that its layers accept nested tensors; T-ReLU does not."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and module.activation in swapped:
            module.activation_relu_or_gelu = int(type(module.activation) is nn.ReLU)
        elif isinstance(module, nn.TransformerEncoder):
            noted, has_swapped = vars(module), any(isinstance(m, TReLU) and _WAS in vars(m) for m in module.modules())
            if has_swapped and _NESTED not in noted:
                noted[_NESTED], module.use_nested_tensor = module.use_nested_tensor, False
            elif not has_swapped and _NESTED in noted:
                module.use_nested_tensor = noted.pop(_NESTED)


def _swap(module: nn.Module, kind: type[nn.Module]) -> None:
    was = parametrize.type_before_parametrizations(module)
    _give_class(module, was, kind)
    vars(module)[_WAS] = was


def _give_class(module: nn.Module, was: type[nn.Module], kind: type[nn.Module]) -> None:
    """Replace class ``was`` of a module by ``kind``. A parametrization or FSDP gives a module a class of its own, of
    which ``was`` is a base; then that class is made again over the new base."""
    module.__class__ = _rebased(type(module), was, kind)


def _rebased(cls: type, was: type, kind: type) -> type:
    if cls is was:
        return kind
    if was not in cls.__mro__:
        return cls
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    bases = tuple(_rebased(base, was, kind) for base in cls.__bases__)
    return type(cls.__name__.replace(was.__name__, kind.__name__), bases, own)
