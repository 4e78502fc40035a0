"""Pruning (section II.B): whole channels are removed from the model, with everything that belongs to them.

``torch-pruning`` finds the channels that depend on each other; it is taught the project's layers. A cut is a table of
the indices that stay, by tensor and axis. One table narrows parameters, batch norm statistics, momentum and the moving
average alike, in place. The optimiser goes on with the narrowed parameters and their state, and training goes on as if
the channels had never been there.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
import torch_pruning
from torch import Tensor, nn

import rkl_kernels as rk

from ..network.blocks import SEPARABLE, MultiScaleSeparable
from ..network.model import all_exits

Side = Literal["in", "out"]
Importance = Literal["magnitude", "taylor"]
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


class _SeparableRule(torch_pruning.BasePruningFunc):  # type: ignore[misc]  # the package has no types
    """A separable convolution for torch-pruning. Its channels in and out are independent, as in a dense convolution.

    torch-pruning only builds the graph here; :func:`apply_cut` narrows the tensors.
    """

    def prune_out_channels(self, layer: Separable, idxs: list[int]) -> nn.Module:
        raise NotImplementedError

    def prune_in_channels(self, layer: Separable, idxs: list[int]) -> nn.Module:
        raise NotImplementedError

    def get_out_channels(self, layer: Separable) -> int:
        return layer.pointwise.out_channels

    def get_in_channels(self, layer: Separable) -> int:
        return layer.pointwise.in_channels


class Group:
    """Channels that must be removed together: a channel has one number in all layers of the group."""

    def __init__(self, members: Sequence[tuple[str, Layer, Side, list[int], list[int]]]) -> None:
        self.members = members
        self.channels = 1 + max(max(root) for *_, root in members)

    def importance(self, by: Importance = "magnitude") -> Tensor:
        """(channels,): importance of filters and gammas, each over its layer's mean, summed over the group's layers.

        By "magnitude" it is the L1 norm. By "taylor" it is |sum of w * dL/dw|, the first-order change of the loss
        without the channel (Molchanov et al., 2019), from the gradients that the parameters hold.
        """
        score = torch.zeros(self.channels)
        for _, layer, side, indices, root in self.members:
            if side == "in" and not isinstance(layer, nn.BatchNorm2d):
                continue
            own = _magnitude(layer) if by == "magnitude" else _first_order(layer)
            own = (own / own.mean().clamp_min(1e-12)).cpu()
            score.index_add_(0, torch.tensor(root), own[torch.tensor(indices)])
        return score


def _ranked(layer: Layer) -> list[Tensor]:
    """The parameters that rank a layer's output channels: the filter, or the gain (and shift)."""
    if isinstance(layer, nn.BatchNorm2d):
        return [layer.weight, layer.bias]
    return [(layer.pointwise if isinstance(layer, SEPARABLE) else layer).weight]


def _magnitude(layer: Layer) -> Tensor:
    weight = _ranked(layer)[0].detach().abs()
    return weight.reshape(len(weight), -1).sum(1)


def _first_order(layer: Layer) -> Tensor:
    products = [(weight * weight.grad).detach() for weight in _ranked(layer) if weight.grad is not None]
    return sum((p.reshape(len(p), -1).sum(1) for p in products), torch.zeros_like(_magnitude(layer))).abs()


def channel_groups(model: nn.Module, example: Tensor) -> list[Group]:
    """All groups of ``model``. The loss compares the heads' features, so their channels belong to one group.

    Args:
        example: (N, C, H, W), any images of the right shape; their values do not matter.
    """
    training = model.training
    frozen = {p: p.requires_grad for p in model.parameters()}
    # The tracer follows autograd's graph. If only the image needs a gradient, it sees the image's path and not the
    # arithmetic that merges filters.
    model.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(
                model,
                example.detach().clone().requires_grad_(),
                forward_fn=_traced,
                customized_pruners={kind: _SeparableRule() for kind in SEPARABLE},
                verbose=False,
            )
        names = {module: name for name, module in model.named_modules()}
        roots = (nn.Conv2d, *SEPARABLE)
        found = [_group(graph, group, names) for group in graph.get_all_groups(root_module_types=roots)]
    finally:
        model.train(training)
        for parameter, wanted in frozen.items():
            parameter.requires_grad_(wanted)
    return [group for group in found if group is not None]


def _traced(model: nn.Module, x: Tensor) -> list[Tensor]:
    exits = all_exits(model, x)
    return [*exits.logits, *([torch.stack(exits.features).sum(0)] if len(exits.features) > 1 else [])]


def _group(graph: torch_pruning.DependencyGraph, group, names: dict[nn.Module, str]) -> Group | None:  # type: ignore[no-untyped-def]
    members = []
    for item in group:
        layer, handler = item.dep.target.module, item.dep.handler
        if isinstance(layer, PRUNABLE):
            side: Side = "out" if graph.is_out_channel_pruning_fn(handler) else "in"
            members.append((names[layer], layer, side, list(item.idxs), list(item.root_idxs)))
    return Group(members) if members else None


def channels_kept(channels: int, ratio: float) -> int:
    """How many of a group's channels stay when at most ``ratio`` of them may go.

    The number is a multiple of 8. If ``ratio * channels`` is below 8, it is a multiple of the largest power of two
    within that instead, so that narrow models can be cut. A larger ratio never keeps more channels than a smaller one:
    of 9 channels, 7 removable ones leave 4, so 8 removable ones do too, although 4 is no multiple of 8.
    """
    removable = int(channels * ratio + 1e-9)
    return min([channels, *(_rounded_up(channels - gone, gone) for gone in range(1, removable + 1))])


def _rounded_up(kept: int, gone: int) -> int:
    step = min(8, 2 ** int(math.log2(gone)))
    return math.ceil(kept / step) * step


def plan_cut(model: nn.Module, example: Tensor, ratio: float, by: Importance = "magnitude") -> Cut:
    """The cut that removes the least important channels of every group, at most ``ratio`` of them."""
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be between 0 and 1, got {ratio}")
    return _cut_of(channel_groups(model, example), ratio, by)


def _cut_of(groups: list[Group], ratio: float, by: Importance = "magnitude") -> Cut:
    cut: Cut = {}
    for group in groups:
        score = group.importance(by)
        leaving = set(score.argsort()[: group.channels - channels_kept(group.channels, ratio)].tolist())
        for name, layer, side, indices, root in group.members:
            gone = {index for index, source in zip(indices, root, strict=True) if source in leaving}
            if gone:
                _keep_all_but(cut, name, layer, side, gone)
    return cut


def _keep_all_but(cut: Cut, name: str, layer: Layer, side: Side, gone: set[int]) -> None:
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
                _keep_all_but(cut, name, layers[name], side, gone)  # type: ignore[arg-type]
    apply_cut(model, cut)


def prune(
    model: nn.Module,
    example: Tensor,
    ratio: float,
    optimizer: torch.optim.Optimizer | None = None,
    followers: Iterable[nn.Module] = (),
    by: Importance = "magnitude",
) -> Cut:
    """Remove at most ``ratio`` of every group's channels from ``model``, in place.

    Args:
        example: images of the right shape.
        optimizer: its momentum (and any other state of a parameter's shape) loses the same channels.
        followers: models with the same tensors (a moving average, a teacher) that lose the same channels.
        by: what ranks the channels; "taylor" needs the parameters' gradients.
    """
    cut = plan_cut(model, example, ratio, by)
    apply_cut(model, cut, optimizer)
    for follower in followers:
        apply_cut(follower, cut)
    return cut


LARGEST = 0.95
"""The largest ratio of a cut to a target."""


def smallest_ratio(model: nn.Module, example: Tensor, fits: Callable[[nn.Module], bool], target: str) -> float:
    """The smallest ratio up to LARGEST (to 1 part in 128, by seven halvings) whose cut leaves a model that ``fits``.

    Args:
        fits: a condition that, if one cut fulfils it, every larger cut fulfils too.
        target: the target's name in the error.

    Raises:
        ValueError: not even the largest cut fits.
    """

    groups = channel_groups(model, example)  # the same for every ratio

    def cut_fits(ratio: float) -> bool:
        slim = copy.deepcopy(model)
        apply_cut(slim, _cut_of(groups, ratio))
        return fits(slim)

    low, high = 0.0, LARGEST
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (low, middle) if cut_fits(middle) else (middle, high)
    if high == LARGEST and not cut_fits(high):
        raise ValueError(
            f"{target} must be within reach of a cut of {LARGEST:.0%} of the channels, got one that is not"
        )
    return high
