"""The options of ``rkl train``: a preset, a file, and every setting of a run, with one group of options per subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .config import (
    RECIPES,
    Config,
    DataSettings,
    MachineSettings,
    ModelSettings,
    PruningSettings,
    RunSettings,
    TrainingSettings,
    from_plain,
    read_yaml,
)
from .distill import LossWeights
from .terminal import parse


@dataclass(frozen=True)
class Source:
    """Where a run's settings come from, before single options replace them."""

    recipe: str | None = None
    """Preset: paper (table I, the default), strong (200 epochs, cosine) or smoke (takes seconds)."""
    config: Path | None = None
    """YAML file of settings, which replace the recipe's."""
    resume: bool = False
    """Go on with the interrupted run in --out, with the settings it has."""


@dataclass(frozen=True)
class _Folder:
    out: Path = RunSettings.out


@dataclass(frozen=True, kw_only=True)
class Train(Source):
    """Train a model by self-distillation. Single options replace --config's settings, and those replace --recipe's."""

    run: Annotated[RunSettings, tyro.conf.arg(name="")]
    data: Annotated[DataSettings, tyro.conf.OmitArgPrefixes]
    model: Annotated[ModelSettings, tyro.conf.OmitArgPrefixes]
    training: Annotated[TrainingSettings, tyro.conf.OmitArgPrefixes]
    pruning: Annotated[PruningSettings, tyro.conf.OmitArgPrefixes]
    machine: Annotated[MachineSettings, tyro.conf.OmitArgPrefixes]
    loss: LossWeights
    """Weights of the loss terms."""

    @classmethod
    def of(cls, config: Config) -> Train:
        """The options with the values of a configuration."""
        return cls(
            run=config.part(RunSettings),
            data=config.part(DataSettings),
            model=config.part(ModelSettings),
            training=config.part(TrainingSettings),
            pruning=config.part(PruningSettings),
            machine=config.part(MachineSettings),
            loss=config.loss,
        )

    @property
    def settings(self) -> Config:
        """The configuration that the options make."""
        parts = (self.run, self.data, self.model, self.training, self.pruning, self.machine)
        return Config(loss=self.loss, **{name: value for part in parts for name, value in vars(part).items()})


def read_options(arguments: Sequence[str]) -> Train:
    """Parse the arguments. Single options replace the settings of ``--config``, and those replace the settings of
    ``--recipe``. With ``--resume`` and neither of the two, they replace the settings of the run in ``--out``.

    Raises:
        ValueError: an unknown recipe, a file that is no configuration, or a setting of a wrong type or out of range.
    """
    source, _ = parse(Source, arguments, return_unknown_args=True, add_help=False)
    recipe = source.recipe or "paper"
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    base = from_plain(RECIPES[recipe])
    if source.config:
        base = read_yaml(source.config, base)
    elif source.resume and source.recipe is None:
        folder, _ = parse(_Folder, arguments, return_unknown_args=True, add_help=False)
        file = folder.out / "config.yaml"
        if not file.is_file():
            raise ValueError(
                f"{folder.out}: out must be the folder of a run to --resume without --recipe or --config, "
                "got no config.yaml in it; leave --resume out to begin one"
            )
        base = read_yaml(file)
    options: Train = parse(Train, arguments, default=Train.of(base), prog="rkl train")
    return options
