"""The configuration of a run: one flat dataclass, the recipes that preset it, and its YAML form."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from .blocks import ActivationName, BlockOptions, GateKind, ScaleMode
from .distill import LossWeights


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's result; with the data, that is all there is to reproduce it."""

    out: Path = Path("runs/default")
    """Folder of the run."""
    seed: int = 0
    """Decides the initial values, the validation split and every batch."""

    data: str = "digits"
    """Data set: `rkl info --datasets` lists them."""
    data_root: Path | None = None
    """Folder of its files; by default where they usually are."""
    image_size: int | None = None
    """Pixels a side; the data set's own by default."""
    val_fraction: float = 0.1
    """Share of the training images that decides what is decided by validation."""
    train_size: int | None = None
    """Use a fixed part of the training images."""
    test_size: int | None = None
    """Use a fixed part of the test images."""
    imbalance: float = 100.0
    """Of long-tailed data sets (-lt): images of the first class over those of the last."""
    download: bool = False
    """Fetch the data set's files into data_root where they are missing."""
    augment: Literal["none", "standard"] = "standard"
    """Random crops, and flips where the classes allow it."""
    cutmix: bool = True
    """Mix every batch with itself (equation 1)."""
    cutout: int = 0
    """Side of a square to blank in each image, in pixels."""
    sampling: Literal["natural", "balanced"] = "natural"
    """Balanced draws every class equally often."""
    class_weights: bool = False
    """Weigh the classes by their inverse frequency in the cross entropy."""

    model: str = "resnet-kl"
    """Model: `rkl info --models` lists them."""
    depth: int = 18
    """18, 34 or 50."""
    width: int = 64
    """Channels of the first stage."""
    separable: bool | None = None
    """Separable in place of dense 3x3 convolutions; this and the next five: the model's own by default."""
    scales: tuple[int, ...] | None = None
    """Kernel sizes of the depthwise step."""
    scale_mode: ScaleMode | None = None
    """All sizes summed in every channel, one size a channel, or one size a stage."""
    gate: GateKind | None = None
    """Gate of the blocks."""
    activation: ActivationName | None = None
    """T-ReLU or ReLU."""
    exits: bool | None = None
    """Heads after every stage."""
    exit_gate: GateKind = "light"
    """Gate of the shallow heads."""
    feature_size: int | None = None
    """Side of the feature maps that are compared; the deepest stage's own by default."""

    loss: LossWeights = field(default_factory=LossWeights)
    """Weights of the loss terms."""

    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 256
    """Images a step, on each device."""
    lr: float = 0.01
    """Learning rate before any decay."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 5e-4
    """SGD's weight decay."""
    schedule: Literal["thirds", "cosine"] = "thirds"
    """A tenth after each third of the epochs, or half a cosine."""
    warmup: float = 0.0
    """Epochs over which the learning rate rises to its value."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then what is evaluated; 0 for none."""
    prune_at: tuple[float, ...] = ()
    """Shares of the epochs after which channels are cut."""
    prune_ratio: float = 0.2
    """Largest share of a group's channels that one cut takes."""
    prune_macs: float | None = None
    """Share of the first model's multiply-accumulates that the last cut leaves at most, each cut taking the same part
    of what there is; it decides in prune_ratio's place."""

    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """As Lightning Fabric names it."""
    devices: int = 1
    """Devices to train on, with DistributedDataParallel where more than one."""
    channels_last: bool = True
    """Keep images and feature maps in channels-last order, which the kernels prefer."""

    def __post_init__(self) -> None:
        rules = {
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 2,
            "lr": self.lr > 0,
            "val_fraction": 0 < self.val_fraction < 1,
            "ema": 0 <= self.ema < 1,
            "prune_ratio": 0 < self.prune_ratio < 1,
            "prune_macs": self.prune_macs is None or 0 < self.prune_macs < 1,
            "prune_at": all(0 < share < 1 for share in self.prune_at),
            "devices": self.devices >= 1,
        }
        bounds = {
            "epochs": "at least 1",
            "batch_size": "at least 2, as batch norm needs several samples",
            "lr": "above 0",
            "val_fraction": "between 0 and 1",
            "ema": "at least 0 and below 1",
            "prune_ratio": "between 0 and 1",
            "prune_macs": "between 0 and 1",
            "prune_at": "shares of the epochs, between 0 and 1",
            "devices": "at least 1",
        }
        for name, holds in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {bounds[name]}, got {getattr(self, name)}")

    @property
    def cut_epochs(self) -> list[int]:
        """After how many epochs channels are cut; one cut an epoch, the last epoch left to recover in."""
        return sorted({min(max(1, round(share * self.epochs)), self.epochs - 1) for share in self.prune_at} - {0})

    def block_options(self, defaults: BlockOptions) -> BlockOptions:
        """The model's blocks, with what was left open taken from ``defaults``."""
        chosen = {f.name: getattr(self, f.name) for f in fields(BlockOptions)}
        return replace(defaults, **{name: value for name, value in chosen.items() if value is not None})


RECIPES: dict[str, dict[str, Any]] = {
    # Table I, with the cuts after epochs 4, 8 and 12 of 50.
    "paper": {"prune_at": (0.08, 0.16, 0.24)},
    # The protocol of the public self-distillation benchmarks on CIFAR-100.
    "strong": {"epochs": 200, "batch_size": 128, "lr": 0.1, "schedule": "cosine", "prune_at": (0.08, 0.16, 0.24)},
    # Seconds, for tests: nothing is learnt to speak of.
    "smoke": {
        "epochs": 2,
        "batch_size": 64,
        "lr": 0.05,
        "width": 8,
        "train_size": 256,
        "test_size": 100,
        "image_size": 8,
        "prune_at": (0.5,),
    },
}


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration as YAML and JSON know it."""
    plain = asdict(config)
    for name, value in plain.items():
        if isinstance(value, Path):
            plain[name] = str(value)
        elif isinstance(value, tuple):
            plain[name] = list(value)
    return plain


def from_plain(plain: dict[str, Any], base: Config | None = None, source: str = "config") -> Config:
    """The configuration with the values of ``plain``; the rest as in ``base``.

    Raises:
        ValueError: a key that does not exist.
    """
    base = base or Config()
    known = {f.name for f in fields(Config)}
    values = dict(plain)
    for key in values:
        if key not in known:
            raise ValueError(f"{source}: keys must be fields of the configuration, got {key!r}")
    if "loss" in values:
        odd = set(values["loss"]) - {f.name for f in fields(LossWeights)}
        if odd:
            raise ValueError(f"{source}: keys of loss must be loss weights, got {sorted(odd)[0]!r}")
        values["loss"] = replace(base.loss, **values["loss"])
    for key in ("out", "data_root"):
        if values.get(key) is not None:
            values[key] = Path(values[key])
    for key in ("scales", "prune_at"):
        if values.get(key) is not None:
            values[key] = tuple(values[key])
    return replace(base, **values)


def read_yaml(path: Path, base: Config | None = None) -> Config:
    """The configuration in a YAML file."""
    try:
        plain = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: the configuration must be a readable file, got: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: the configuration must be YAML, got: {str(error).splitlines()[0]}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: the configuration must be a mapping of names to values")
    return from_plain(plain, base, str(path))
