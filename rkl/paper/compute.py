"""Rows of equal compute: finds the width at which a network has a given number of multiply-accumulates."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from ..config import Config
from ..network.build import build_model
from ..slimming import pruning
from ..training import metrics

KEPT = 0.667
"""The share of multiply-accumulates that cuts leave in a network of given compute."""


@cache
def _macs(config: Config, classes: int, channels: int, image_size: int) -> int:
    model = build_model(config, classes, channels, image_size)
    image = torch.zeros(1, channels, image_size, image_size)
    # The number of channels that a cut leaves depends only on their number, so any weights will do.
    for _ in config.cut_epochs if config.prune_macs is None else ():
        pruning.prune(model, image, config.prune_ratio)
    return round(metrics.count_macs(model, image) * (config.prune_macs or 1))


def macs(config: Config, classes: int, channels: int, image_size: int) -> int:
    """Multiply-accumulates for an image in a configuration's network, after its cuts."""
    with torch.random.fork_rng(devices=[]):
        return _macs(config, classes, channels, image_size)


def at_macs(config: Config, target: float, classes: int, channels: int, image_size: int) -> Config:
    """The configuration at the width whose multiply-accumulates come closest to ``target``.

    If the network is cut, ``target`` is :data:`KEPT` times the multiply-accumulates before the cuts. The width is then
    a multiple of 4, and the cuts go to ``target``, as closely as whole channels allow. Else any width will do.
    """
    shape = (classes, channels, image_size)
    whole = _whole(config)
    cut = bool(config.cut_epochs)
    aim, step = (target / KEPT, 4) if cut else (target, 1)

    def own(width: int) -> int:
        return macs(replace(whole, width=width), *shape)

    width = config.width
    for _ in range(2):  # multiply-accumulates are nearly quadratic in the width
        width = max(step, round(width * (aim / own(width)) ** 0.5 / step) * step)
    width = min((w for w in (width - step, width, width + step) if w), key=lambda w: abs(own(w) - aim))
    if not cut:
        return replace(config, width=width)
    return cut_to_macs(replace(config, width=width), target, *shape)


def _whole(config: Config) -> Config:
    return replace(config, prune_at=(), prune_macs=None)


def cut_to_macs(config: Config, target: float, classes: int, channels: int, image_size: int) -> Config:
    """The configuration with cuts that leave ``target`` multiply-accumulates."""
    whole = macs(_whole(config), classes, channels, image_size)
    return replace(config, prune_macs=min(target / whole, 0.99))
