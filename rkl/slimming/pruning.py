"""Pruning (section II.B): whole channels are removed from the model, with everything that belongs to them.

``torch-pruning`` finds the channels that depend on each other; it is taught the project's layers. Then
:mod:`rkl.slimming.channels` narrows the tensors.
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

from ..network.blocks import SEPARABLE
from ..network.model import all_exits
from .channels import PRUNABLE, Cut, Layer, Separable, Side, apply_cut, keep_all_but

Importance = Literal["magnitude", "taylor"]


class _SeparableRule(torch_pruning.BasePruningFunc):  # type: ignore[misc]  # the package has no types
    """A separable convolution for torch-pruning. Its channels in and out are independent, as in a dense convolution.

    torch-pruning only builds the graph here; ``apply_cut`` narrows the tensors.
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
    removable = min(int(channels * ratio + 1e-9), channels - 1)
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
                keep_all_but(cut, name, layer, side, gone)
    return cut


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
