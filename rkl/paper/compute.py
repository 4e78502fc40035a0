"""Rows of equal compute: the width at which a configuration's network has so many multiply-accumulates."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from ..config import Config
from ..network.build import build_model
from ..slimming import pruning
from ..training import metrics

KEPT = 0.667
"""Share of its multiply-accumulates that the cuts leave a network whose compute is given."""


@cache
def _macs(config: Config, classes: int, channels: int, image_size: int) -> int:
    model = build_model(config, classes, channels, image_size)
    image = torch.zeros(1, channels, image_size, image_size)
    # How many channels a cut leaves depends on their number alone, so any weights do.
    for _ in config.cut_epochs if config.prune_macs is None else ():
        pruning.prune(model, image, config.prune_ratio)
    return round(metrics.count_macs(model, image) * (config.prune_macs or 1))


def macs(config: Config, classes: int, channels: int, image_size: int) -> int:
    """Multiply-accumulates an image of a configuration's network, after its cuts."""
    with torch.random.fork_rng(devices=[]):
        return _macs(config, classes, channels, image_size)


def at_macs(config: Config, target: float, classes: int, channels: int, image_size: int) -> Config:
    """The configuration at the width whose multiply-accumulates come closest to ``target``.

    Where it is cut, the width is that of :data:`KEPT` times as many, in steps of 4 channels, and its cuts go to
    ``target`` exactly as far as channels can be counted; else every whole width will do.
    """
    shape = (classes, channels, image_size)
    whole = _whole(config)
    cut = bool(config.cut_epochs)
    aim, step = (target / KEPT, 4) if cut else (target, 1)

    def own(width: int) -> int:
        return macs(replace(whole, width=width), *shape)

    width = config.width
    for _ in range(2):  # nearly quadratic in the width
        width = max(step, round(width * (aim / own(width)) ** 0.5 / step) * step)
    width = min((w for w in (width - step, width, width + step) if w), key=lambda w: abs(own(w) - aim))
    if not cut:
        return replace(config, width=width)
    return cut_to_macs(replace(config, width=width), target, *shape)


def _whole(config: Config) -> Config:
    return replace(config, prune_at=(), prune_macs=None)


def cut_to_macs(config: Config, target: float, classes: int, channels: int, image_size: int) -> Config:
    """The configuration whose cuts leave ``target`` multiply-accumulates."""
    whole = macs(_whole(config), classes, channels, image_size)
    return replace(config, prune_macs=min(target / whole, 0.99))
