"""How far the cuts of a run go: the ratio of each cut, and whether the last one can reach the target."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import Tensor, nn

from ..config import Config
from ..slimming import pruning
from . import metrics


def cut_ratio(config: Config, model: nn.Module, image: Tensor, cuts: list[dict[str, Any]], macs: float) -> float:
    """The ratio of the cut that follows ``cuts``, on a model of ``macs`` multiply-accumulates. It is prune_ratio or, if
    prune_macs is set, the smallest ratio that takes this cut's part of the way to it."""
    if config.prune_macs is None:
        return config.prune_ratio
    first = cuts[0]["before"]["macs"] if cuts else macs
    return _ratio_to(model, image, first * config.prune_macs ** ((len(cuts) + 1) / len(config.cut_epochs)))


def _ratio_to(model: nn.Module, image: Tensor, macs: float) -> float:
    target = f"{macs:.0f} multiply-accumulates, this cut's part of the way to prune_macs,"
    return pruning.smallest_ratio(model, image, lambda slim: metrics.count_macs(slim, image) <= macs, target)


def check_reach(config: Config, model: nn.Module, image: Tensor) -> None:
    """Refuse a prune_macs that the cuts cannot reach, before the first epoch rather than at the cut."""
    if config.prune_macs is None:
        return
    least = least_share(model, image, config.prune_macs, len(config.cut_epochs))
    if least > config.prune_macs:
        raise ValueError(
            f"prune_macs must be at least {least:g}, which is as far as cuts of up to {pruning.LARGEST:.0%} of the "
            f"channels take this network ({len(config.cut_epochs)} of them), got {config.prune_macs}"
        )


def least_share(model: nn.Module, image: Tensor, share: float, cuts: int) -> float:
    """The smallest share of the model's multiply-accumulates, not below ``share``, that ``cuts`` cuts reach if each
    takes the same part; rounded up to thousandths. It is known before training, since the number of channels that a cut
    leaves depends on their number alone."""
    slim, whole = copy.deepcopy(model), metrics.count_macs(model, image)
    for number in range(1, cuts + 1):
        try:
            ratio = _ratio_to(slim, image, whole * share ** (number / cuts))
        except ValueError:
            pruning.prune(slim, image, pruning.LARGEST)
            reached = (metrics.count_macs(slim, image) / whole) ** (cuts / number)  # above ``share``
            return least_share(model, image, math.ceil(1000 * reached) / 1000, cuts)
        pruning.prune(slim, image, ratio)
    return share
