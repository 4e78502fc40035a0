"""Swap the layers of an existing model for this package's, in place."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch import Tensor, nn

from .layers import DepthwiseConv2d, TReLU, separable_layers


@dataclass
class Conversion:
    """What :func:`convert` did: names of the swapped modules, and of the convolutions it had to leave, with why."""

    depthwise: list[str] = field(default_factory=list)
    separable: list[tuple[str, str]] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            (
                f"{len(self.separable)} depthwise + pointwise pairs fused, {len(self.depthwise)} other depthwise "
                f"convolutions swapped, {len(self.activations)} activations replaced"
            )
        ]
        return "\n".join(lines + [f"left {name}: {why}" for name, why in self.left.items()])


class _FusedPair(DepthwiseConv2d):
    """A depthwise convolution that also runs the pointwise one after it, whose place then passes its input on.

    The partner stays a registered module where it was, so every state_dict key keeps its name; here it stands in a
    tuple, which registers nothing.
    """

    partner: tuple[_Absorbed]

    def forward(self, x: Tensor) -> Tensor:
        return separable_layers(x, self, self.partner[0])


class _Absorbed(nn.Conv2d):
    """A pointwise convolution that the depthwise one before it has already run: parameters only."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def convert(model: nn.Module, activation: str | None = None) -> Conversion:
    """Swap depthwise convolutions, and depthwise + pointwise pairs, for this package's layers, in place.

    Weights, hooks, training mode and state_dict keys stay as they are: a swapped layer is the same object with another
    class. Pairs are fused where the two stand next to each other in an ``nn.Sequential``; a depthwise convolution with
    something between (a batch norm, say) is swapped alone.

    Args:
        model: any module; its children are searched, at every depth.
        activation: "trelu" to replace every ``nn.ReLU`` too; None leaves activations alone.

    Returns:
        The report of what was done; print it.

    Raises:
        ValueError: ``activation`` is neither None nor "trelu".
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if activation not in (None, "trelu"):
        raise ValueError(f"activation must be None or 'trelu', got {activation!r}")
    report = Conversion()
    for prefix, parent in model.named_modules():
        if isinstance(parent, nn.Sequential):
            _fuse_neighbours(prefix, parent, report)
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and _is_depthwise(name, module, report):
            module.__class__ = DepthwiseConv2d
            report.depthwise.append(name)
        elif activation and type(module) is nn.ReLU:
            module.__class__ = TReLU
            report.activations.append(name)
    return report


def _fuse_neighbours(prefix: str, parent: nn.Sequential, report: Conversion) -> None:
    children = list(parent.named_children())
    for (first_name, first), (second_name, second) in itertools.pairwise(children):
        names = _join(prefix, first_name), _join(prefix, second_name)
        if not (type(first) is nn.Conv2d and type(second) is nn.Conv2d and _is_pointwise(second)):
            continue
        if _has_hooks(first) or _has_hooks(second) or not _is_depthwise(names[0], first, report):
            continue
        first.__class__, second.__class__ = _FusedPair, _Absorbed
        first.partner = (second,)  # type: ignore[assignment]
        report.separable.append(names)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _has_hooks(module: nn.Module) -> bool:
    """Hooks on either layer would see another tensor after fusing, so such a pair stays two calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _is_depthwise(name: str, conv: nn.Conv2d, report: Conversion) -> bool:
    if conv.groups == 1 or conv.groups != conv.in_channels:
        return False
    if conv.out_channels != conv.in_channels:
        report.left[name] = f"{conv.out_channels // conv.in_channels} filters a channel; one is served"
        return False
    if conv.padding_mode != "zeros":
        report.left[name] = f"padding_mode={conv.padding_mode!r}; 'zeros' is served"
        return False
    return True


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.groups) == ((1, 1), (1, 1), 1) and conv.padding in (
        (0, 0),
        "same",
        "valid",
    )
