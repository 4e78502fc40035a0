"""The channels of a network's layers: which axes hold them, and how a cut removes some from the whole model.

A cut is a table of the indices that stay, by tensor and axis. One table narrows parameters, batch norm statistics,
momentum and the moving average alike, in place. The optimiser goes on with the narrowed parameters and their state, and
training goes on as if the channels had never been there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

import rkl_kernels as rk

from ..network.blocks import SEPARABLE, MultiScaleSeparable

Side = Literal["in", "out"]
Cut = dict[str, dict[int, Tensor]]
"""The indices that stay, by the name of a parameter or buffer, then by axis."""
Plan = dict[str, list[int]]
"""Channels in and out of every layer, by module name. JSON files hold a pruned model's architecture in this form."""

PRUNABLE = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, *SEPARABLE)
Separable = rk.SeparableConv2d | MultiScaleSeparable
Layer = nn.Conv2d | nn.BatchNorm2d | nn.Linear | Separable


def tensor_axes(layer: Layer) -> dict[str, dict[int, tuple[Side, ...]]]:
    """For each tensor of a layer, which axes hold its input or output channels."""
    if isinstance(layer, SEPARABLE):
        names = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())}
        inner: dict[str, dict[int, tuple[Side, ...]]] = {
            name: {0: ("in",)} for name in names if name.startswith("depthwise.")
        }
        return inner | {"pointwise.weight": {0: ("out",), 1: ("in",)}, "pointwise.bias": {0: ("out",)}}
    if isinstance(layer, nn.BatchNorm2d):
        return {name: {0: ("in", "out")} for name in ("weight", "bias", "running_mean", "running_var")}
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return {name: {0: ("in", "out")} for name in ("weight", "bias")}
    return {"weight": {0: ("out",), 1: ("in",)}, "bias": {0: ("out",)}}


def _layers(model: nn.Module) -> Iterable[tuple[str, Layer]]:
    """The layers that have channels, outer modules first. A separable convolution counts as one layer."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, PRUNABLE) and module not in inside:
            inside.update(module.modules())
            yield name, module


def keep_all_but(cut: Cut, name: str, layer: Layer, side: Side, gone: set[int]) -> None:
    """Let the cut remove the channels ``gone`` on one side of the layer of this name."""
    for tensor, axes in tensor_axes(layer).items():
        value = _find(layer, tensor)
        for axis, sides in axes.items():
            if value is not None and side in sides:
                kept = cut.setdefault(f"{name}.{tensor}", {}).get(axis, torch.arange(value.shape[axis]))
                cut[f"{name}.{tensor}"][axis] = torch.tensor([i for i in kept.tolist() if i not in gone])


def _find(layer: nn.Module, name: str) -> Tensor | None:
    *path, last = name.split(".")
    for part in path:
        layer = getattr(layer, part)
    return getattr(layer, last, None)


def narrow(tensor: Tensor, kept: dict[int, Tensor]) -> Tensor:
    """The part of a tensor that stays, in the tensor's memory format."""
    image_like = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    for axis, indices in kept.items():
        tensor = tensor.index_select(axis, indices.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last if image_like else torch.contiguous_format)


@torch.no_grad()
def apply_cut(model: nn.Module, cut: Cut, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Narrow the model in place. The optimiser gets the new parameters and the matching part of their state."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    # New parameters, not new data in the old ones: an autograd graph that is still alive keeps the old shapes.
    narrowed: dict[Tensor, nn.Parameter] = {}
    for name, kept in cut.items():
        if name in buffers:
            buffers[name].set_(narrow(buffers[name], kept))  # type: ignore[call-overload]  # missing in torch's stubs
            continue
        old = parameters[name]
        path, _, last = name.rpartition(".")
        narrowed[old] = nn.Parameter(narrow(old.data, kept), old.requires_grad)
        setattr(model.get_submodule(path), last, narrowed[old])
        state = optimizer.state if optimizer else {}
        for key, value in state.get(old, {}).items():
            same_shape = isinstance(value, Tensor) and value.shape == old.shape
            state[narrowed[old]][key] = narrow(value, kept) if same_shape else value
    if optimizer:
        for group in optimizer.param_groups:
            group["params"] = [narrowed.get(parameter, parameter) for parameter in group["params"]]
        for gone in narrowed:
            optimizer.state.pop(gone, None)
    _count_channels(model)


def _count_channels(model: nn.Module) -> None:
    """Set every layer's channel attributes to the sizes of its tensors."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_features = len(module.weight)
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv2d):
            module.out_channels, within = module.weight.shape[:2]
            module.groups = module.out_channels if module.groups > 1 else 1
            module.in_channels = within * module.groups


def channel_plan(model: nn.Module) -> Plan:
    """Channels in and out of every layer, as they are now."""
    plan: Plan = {}
    for name, layer in _layers(model):
        weight = layer.pointwise.weight if isinstance(layer, SEPARABLE) else layer.weight
        out_channels = weight.shape[0]
        depthwise = isinstance(layer, nn.BatchNorm2d) or (isinstance(layer, nn.Conv2d) and layer.groups > 1)
        plan[name] = [out_channels if depthwise else weight.shape[1], out_channels]
    return plan


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Give a freshly built model the channels of a plan. Load a state dict next: which values stay is arbitrary.

    Raises:
        ValueError: the plan is of another model.
    """
    layers = dict(_layers(model))
    now = channel_plan(model)
    if plan.keys() != now.keys():
        odd = sorted(plan.keys() ^ now.keys())[0]
        raise ValueError(f"the plan of channels must name this model's layers, got a difference at {odd!r}")
    cut: Cut = {}
    for name, wanted in plan.items():
        for position, side in enumerate(("in", "out")):
            if wanted[position] > now[name][position] or wanted[position] < 1:
                raise ValueError(
                    f"channels {side} of {name} must be between 1 and {now[name][position]}, got {wanted[position]}"
                )
            gone = set(range(wanted[position], now[name][position]))
            if gone and not (side == "out" and isinstance(layers[name], nn.BatchNorm2d)):
                keep_all_but(cut, name, layers[name], side, gone)  # type: ignore[arg-type]
    apply_cut(model, cut)
