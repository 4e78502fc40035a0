"""Models by name, for the trainer and the command line."""

from __future__ import annotations

from torch import nn

from ..config import Config
from . import baselines
from .blocks import BlockOptions
from .model import ResNet, ResNetKL

OWN: dict[str, tuple[BlockOptions, bool]] = {
    "resnet-kl": (BlockOptions(), True),
    "resnet": (BlockOptions(separable=False, scales=(3,), gate="none", activation="relu"), False),
}
"""The default block options of the project's own models, and whether the models have exits by default."""


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
