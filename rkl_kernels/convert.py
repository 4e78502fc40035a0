"""Swap the layers of an existing model for this package's, in place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.fx
from torch import Tensor, nn

from .fold import fold, foldable
from .layers import DepthwiseConv2d, TReLU, separable_layers


@dataclass
class Conversion:
    """What :func:`convert` did: names of the swapped modules, and of the convolutions it had to leave, with why."""

    depthwise: list[str] = field(default_factory=list)
    separable: list[tuple[str, str]] = field(default_factory=list)
    folded: list[tuple[str, ...]] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            (
                f"{len(self.separable)} depthwise + pointwise pairs fused, {len(self.folded)} more in inference with "
                f"the batch norm between them, {len(self.depthwise)} other depthwise convolutions swapped, "
                f"{len(self.activations)} activations replaced"
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
    class. A pair is fused where one forward passes the depthwise output to the pointwise convolution and to nothing
    else (next to each other in an ``nn.Sequential``, say). With a batch norm, and perhaps an activation, between them
    they are one call in inference on a CPU (``eval()`` under ``no_grad()`` or ``inference_mode()``), else separate.

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
    for name, module in model.named_modules():
        if activation and type(module) is nn.ReLU:
            module.__class__ = TReLU  # type: ignore[assignment]
            report.activations.append(name)
    for prefix, parent in model.named_modules():
        readers = dict(_sole_readers(parent))
        _fuse_children(prefix, parent, readers, report)
        _fold_children(prefix, parent, readers, report)
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and _is_depthwise(name, module, report):
            module.__class__ = DepthwiseConv2d
            report.depthwise.append(name)
    return report


def _fuse_children(prefix: str, parent: nn.Module, readers: dict[str, str], report: Conversion) -> None:
    """Fuse every pair of convolutions among the children where the second is all that reads the first."""
    children = dict(parent.named_children())
    for first_name, second_name in readers.items():
        first, second = children[first_name], children[second_name]
        if not (type(first) is nn.Conv2d and type(second) is nn.Conv2d and _is_pointwise(second)):
            continue
        names = _join(prefix, first_name), _join(prefix, second_name)
        if _has_hooks(first) or _has_hooks(second) or not _is_depthwise(names[0], first, report):
            continue
        first.__class__, second.__class__ = _FusedPair, _Absorbed
        first.partner = (second,)  # type: ignore[assignment]
        report.separable.append(names)


def _fold_children(prefix: str, parent: nn.Module, readers: dict[str, str], report: Conversion) -> None:
    """Fold every chain among the children of depthwise, batch norm, perhaps an activation, and pointwise; what comes
    before the pointwise may stand in an ``nn.Sequential`` of its own."""
    for start in readers:
        chain = _chain(parent, start, readers)
        modules = [module for _, module in chain]
        if not foldable(modules) or any(_has_hooks(module) for module in [*modules, parent.get_submodule(start)]):
            continue
        first, last = modules[0], modules[-1]
        assert isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d)  # noqa: PT018  for mypy; foldable() asked
        names = tuple(_join(prefix, name) for name, _ in chain)
        if _is_pointwise(last) and _is_depthwise(names[0], first, report):
            fold(modules)
            report.folded.append(names)


def _chain(parent: nn.Module, start: str, readers: dict[str, str]) -> list[tuple[str, nn.Module]]:
    """The modules from child ``start`` to the next convolution after it, each the only reader of the one before."""
    chain: list[tuple[str, nn.Module]] = []
    name: str | None = start
    while name is not None and len(chain) < 4:
        child = parent.get_submodule(name)
        if type(child).forward is nn.Sequential.forward:
            chain += [(_join(name, inner), module) for inner, module in child.named_children()]
        else:
            chain.append((name, child))
        if len(chain) > 1 and type(chain[-1][1]) is nn.Conv2d:
            break
        name = readers.get(name)
    return chain


class _Shallow(torch.fx.Tracer):
    """Records which child feeds which, without looking into the children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _sole_readers(parent: nn.Module) -> list[tuple[str, str]]:
    """Pairs of children, each called once, of which the second is the only reader of the first's output.

    A forward that cannot be traced (control flow on data, say) yields none: its layers are then swapped one by one.
    """
    near = [module for child in parent.children() for module in (child, *child.children())]
    if not any(type(module) is nn.Conv2d and module.groups > 1 for module in near):
        return []
    try:
        nodes = list(_Shallow().trace(parent).nodes)
    except Exception:  # whatever the model's own code raises when called with a stand-in for a tensor
        return []
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    return [
        (str(node.target), str(reader.target))
        for node in nodes
        for reader in node.users
        if node.op == reader.op == "call_module"
        and len(node.users) == len(reader.args) == calls[node.target] == calls[reader.target] == 1
    ]


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
