"""Settings that a run would ignore. They are refused, since the run's record would claim them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from operator import attrgetter

from .config import Config, ModelSettings
from .distill import LossWeights
from .network.baselines import BASELINES
from .network.build import OWN
from .paths import FOLDER

DEFAULT = Config()

OF_OWN_NETWORKS = [f.name for f in fields(ModelSettings) if f.name not in ("model", "width", "weights")]
"""Settings that only the project's own networks have. Baselines are built as published."""

OF_SHALLOW_HEADS = [
    *("exit_gate", "feature_size"),
    *(f"loss.{f.name}" for f in fields(LossWeights) if f.name not in ("l1", "smoothing")),
]
"""Settings that act in a network with several heads alone."""

OF_CUTS = ["prune_ratio", "importance"]

WITHOUT_NORMS = {"alexnet"}
"""Networks without the gains on which the L1 term acts."""


def by_network(config: Config) -> Iterator[tuple[str, str]]:
    """Names of the settings that have no effect on this network, each with what the network or its training lacks."""
    if config.model in OWN:
        blocks, exits = OWN[config.model]
        if not (exits if config.exits is None else config.exits):
            yield from ((name, " without exits") for name in OF_SHALLOW_HEADS)
        if not (blocks.separable if config.separable is None else config.separable):
            yield "dense_stages", " without separable convolutions"
        if len(blocks.scales if config.scales is None else config.scales) == 1:
            yield "scale_mode", " with one kernel size"
    elif config.model in BASELINES:
        for name in dict.fromkeys((*OF_OWN_NETWORKS, *OF_SHALLOW_HEADS)):
            yield name, ", which has no such option"
    if config.model in WITHOUT_NORMS:
        yield "loss.l1", ", which has no batch norm"
    if not config.cutmix:
        yield "cutmix_probability", " without cutmix"
    if not config.cut_epochs:
        yield from ((name, " without cuts") for name in OF_CUTS)


def check_ignored(config: Config) -> None:
    """Raise ValueError if a setting that has no effect differs from its default."""
    for name, lack in by_network(config):
        value = attrgetter(name)(config)
        if value != attrgetter(name)(DEFAULT):
            raise ValueError(f"{name} must be left out for {config.model}{lack}, got {value}")
    if config.mixup and config.cutmix and config.cutmix_probability == 1:
        raise ValueError(
            "mixup must go with a cutmix_probability below 1 or without cutmix, as CutMix takes every batch, "
            f"got {config.mixup}"
        )
    long_tailed = config.data.endswith("-lt") and not config.data.startswith(FOLDER)
    if config.imbalance != DEFAULT.imbalance and not long_tailed:
        raise ValueError(
            f"imbalance must go with a long-tailed data set (-lt), got {config.imbalance} for {config.data}"
        )


def without_ignored(config: Config) -> Config:
    """The configuration with the defaults of all settings that its network ignores. Several networks may be given one
    set of settings."""
    plain = {name: attrgetter(name)(DEFAULT) for name, _ in by_network(config)}
    loss = {name.removeprefix("loss."): plain.pop(name) for name in list(plain) if name.startswith("loss.")}
    return replace(config, loss=replace(config.loss, **loss), **plain)
