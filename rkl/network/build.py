"""Models by name, for the trainer and the command line."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import nn

from ..config import Config, ModelSettings
from . import baselines
from .blocks import BlockOptions
from .model import ResNet, ResNetKL

OWN: dict[str, tuple[BlockOptions, bool]] = {
    "resnet-kl": (BlockOptions(), True),
    "resnet": (BlockOptions(separable=False, scales=(3,), gate="none", activation="relu"), False),
}
"""The default block options of the project's own models, and whether the models have exits by default."""


OWN_OPTIONS: dict[str, Any] = {
    f.name: f.default for f in fields(ModelSettings) if f.name not in ("model", "width", "weights")
}
"""Settings that only the project's own models have, with their defaults. Baselines are built as published."""


def check_options(config: Config) -> None:
    """Raise ValueError if a baseline is given an option that it would ignore: its record would claim the option."""
    for name, default in OWN_OPTIONS.items() if config.model in baselines.BASELINES else ():
        value = getattr(config, name)
        if value != default:
            raise ValueError(f"{name} must be left out for {config.model}, which has no such option, got {value}")


def without_own_options(config: Config) -> Config:
    """The configuration without options that a baseline ignores. Several models may be given one set of options."""
    return replace(config, **OWN_OPTIONS) if config.model in baselines.BASELINES else config


def model_names() -> list[str]:
    """The names that ``--model`` accepts."""
    return [*OWN, *baselines.BASELINES]


def build_model(config: Config, classes: int, channels: int, image_size: int) -> nn.Module:
    """The model that a configuration describes, freshly initialised.

    Raises:
        ValueError: no model of that name, or options that do not go together.
    """
    if config.model in OWN:
        defaults, exits = OWN[config.model]
        options = config.block_options(defaults)
        shape = (classes, config.depth, config.width, channels, image_size, options)
        if exits if config.exits is None else config.exits:
            return ResNetKL(*shape, feature_size=config.feature_size, exit_gate=config.exit_gate)
        return ResNet(*shape)
    if config.model not in model_names():
        raise ValueError(f"model must be one of {', '.join(model_names())}, got {config.model!r}")
    return baselines.create(config.model, classes, channels, image_size, config.width)
