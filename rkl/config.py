"""The configuration of a run: one flat dataclass, the recipes that preset it, and its YAML form."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from rkl_kernels.errors import told

from .distill import LossWeights
from .network.blocks import ActivationName, BlockOptions, GateKind, ScaleMode
from .paths import at_home

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Decay = Literal["filters", "all"]


@dataclass(frozen=True)
class RunSettings:
    """Where the run is written, and its seed."""

    out: Path = Path("runs/default")
    """Folder of the run."""
    seed: int = 0
    """Decides the initial values, the validation split and every batch."""


@dataclass(frozen=True)
class DataSettings:
    """The images, and how they are drawn and augmented."""

    data: str = "digits"
    """Data set: `rkl info --datasets` lists them."""
    data_root: Path | None = None
    """Folder of its files; by default where they usually are."""
    image_size: int | None = None
    """Pixels a side; the data set's own by default."""
    val_fraction: float = 0.1
    """Share of the training images that decides what is decided by validation; 0 trains on all of them."""
    train_size: int | None = None
    """Use a fixed part of the training images."""
    test_size: int | None = None
    """Use a fixed part of the test images."""
    imbalance: float = 100.0
    """Of long-tailed data sets (-lt): images of the first class over those of the last."""
    download: bool = False
    """Fetch the data set's files into data_root where they are missing."""
    augment: Literal["none", "standard", "trivial"] = "standard"
    """Random crops, and flips where the classes allow it; trivial adds TrivialAugment."""
    cutmix: bool = True
    """Mix batches with themselves (equation 1)."""
    cutmix_probability: float = 1.0
    """Share of the batches that CutMix takes; mixup, where it is on, takes the others."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 for none."""
    cutout: int = 0
    """Side of a square to blank in each image, in pixels."""
    erasing: float = 0.0
    """Probability of blanking a random rectangle in an image."""
    sampling: Literal["natural", "balanced"] = "natural"
    """Balanced draws every class equally often."""
    class_weights: bool = False
    """Weigh the classes by their inverse frequency in the cross entropy."""


@dataclass(frozen=True)
class ModelSettings:
    """The network."""

    model: str = "resnet-kl"
    """Model: `rkl info --models` lists them."""
    depth: int = 18
    """18, 34 or 50."""
    width: int = 64
    """Channels of the first stage."""
    separable: bool | None = None
    """Separable in place of dense 3x3 convolutions; this and the next six: the model's own by default."""
    dense_stages: int | None = None
    """How many early stages stay dense where the others are separable."""
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
    weights: Path | None = None
    """Folder of a finished run whose weights to start from; heads for other classes start anew."""


@dataclass(frozen=True)
class TrainingSettings:
    """How the network is trained: SGD, its schedule and its end."""

    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 256
    """Images a forward pass, on each device."""
    accumulate: int = 1
    """Batches, on each device, whose gradients make one step."""
    lr: float = 0.01
    """Learning rate before any decay."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = False
    """Nesterov's momentum."""
    weight_decay: float = 5e-4
    """SGD's weight decay."""
    decay: Decay = "filters"
    """What decays: dense and pointwise filters alone, or norms, biases and depthwise filters too."""
    clip: float = 0.0
    """Largest norm of a step's gradient; 0 for any."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Where a loss or gradient is not finite: end the run, or leave the step out and count it in the log."""
    schedule: Literal["thirds", "cosine"] = "thirds"
    """A tenth after each third of the epochs, or half a cosine."""
    warmup: float = 0.0
    """Epochs over which the learning rate rises to its value."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then what is evaluated; 0 for none."""
    patience: int = 0
    """Stop after so many epochs, all after the last cut, without a better validation accuracy; 0 for never."""
    test_with: Literal["last", "best"] = "last"
    """Which epoch's model is tested, once: the last one, or the best by validation since the last cut."""


@dataclass(frozen=True)
class PruningSettings:
    """When and how channels are cut while the network trains."""

    prune_at: tuple[float, ...] | None = None
    """Shares of the epochs after which channels are cut; by default 0.08 0.16 0.24 for resnet-kl, none for others."""
    prune_ratio: float = 0.2
    """Largest share of a group's channels that one cut takes."""
    prune_macs: float | None = None
    """Share of the first model's multiply-accumulates that the last cut leaves at most, each cut taking the same part
    of what there is; it decides in prune_ratio's place."""
    importance: Literal["magnitude", "taylor"] = "magnitude"
    """What ranks channels for a cut: L1 of filters plus |gamma|, or a first-order estimate of what their loss costs."""


@dataclass(frozen=True)
class MachineSettings:
    """What the run uses of the machine."""

    precision: Precision | None = None
    """By default bf16-mixed on a GPU and 32-true elsewhere."""
    compile: bool = False
    """Compile the model with torch.compile; on a GPU into CUDA graphs, which small models gain most from."""
    devices: int = 1
    """Devices to train on, with DistributedDataParallel where more than one."""
    channels_last: bool = True
    """Keep images and feature maps in channels-last order, which the kernels prefer."""


Part = TypeVar("Part", RunSettings, DataSettings, ModelSettings, TrainingSettings, PruningSettings, MachineSettings)


@dataclass(frozen=True)
class Config(MachineSettings, PruningSettings, TrainingSettings, ModelSettings, DataSettings, RunSettings):
    """Everything that decides a run's result; with the data, that is all there is to reproduce it."""

    loss: LossWeights = field(default_factory=LossWeights)
    """Weights of the loss terms."""

    def __post_init__(self) -> None:
        for name, (holds, bounds) in RULES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {bounds}, got {value}")
        if self.warmup > self.epochs:
            raise ValueError(f"warmup must be at most the {self.epochs} epochs, got {self.warmup}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov must go with a momentum above 0, got momentum 0")
        if not self.cut_epochs and (self.prune_at or self.prune_macs is not None):
            name = "prune_at" if self.prune_at else "prune_macs"
            raise ValueError(
                f"{name} must go with a cut that leaves an epoch to recover in, got {getattr(self, name)} with "
                f"prune_at {self.prune_at} and {self.epochs} epochs of {self.model}"
            )
        for name, needs in (("patience", self.patience), ("test_with", self.test_with == "best")):
            if needs and not self.val_fraction:
                raise ValueError(f"{name} must go with a val_fraction above 0, got {getattr(self, name)}")

    def part(self, kind: type[Part]) -> Part:
        """The settings of one subject, which are a group of the command line's options."""
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind)})

    @property
    def cut_epochs(self) -> list[int]:
        """After how many epochs channels are cut; one cut an epoch, the last epoch left to recover in."""
        shares = CUTS.get(self.model, ()) if self.prune_at is None else self.prune_at
        return sorted({min(max(1, round(share * self.epochs)), self.epochs - 1) for share in shares} - {0})

    def learning_rate(self, progress: float) -> float:
        """After ``progress`` epochs: a tenth after each third, or half a cosine; linear warm-up."""
        warm = min(1.0, progress / self.warmup) if self.warmup else 1.0
        share = progress / self.epochs
        if self.schedule == "thirds":
            return self.lr * warm * 0.1 ** int(3 * share + 1e-9)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * share))

    def l1_at(self, epoch: int, steps: int) -> float:
        """The weight of the L1 term in an epoch, from 0, of so many steps. It prepares the cuts, so it acts until the
        last one, and by default not at all where there is none.

        By default it takes a gamma that nothing holds from 1, where it starts, to 0 by the last cut, so that the gammas
        spread and the cuts can rank them; a gamma's way is lambda * learning rate * steps / (1 - momentum). It is
        MOST_L1 at most: in a short run that way asks for more than the loss's own gradients hold against.
        """
        if not self.cut_epochs:
            return self.loss.l1 or 0.0
        if epoch >= self.cut_epochs[-1]:
            return 0.0
        if self.loss.l1 is not None:
            return self.loss.l1
        way = steps * sum(self.learning_rate(e + 0.5) for e in range(self.cut_epochs[-1])) / (1 - self.momentum)
        return min(1.0 / way, MOST_L1)

    def block_options(self, defaults: BlockOptions) -> BlockOptions:
        """The model's blocks, with what was left open taken from ``defaults``."""
        chosen = {f.name: getattr(self, f.name) for f in fields(BlockOptions)}
        return replace(defaults, **{name: value for name, value in chosen.items() if value is not None})


MOST_L1 = 1e-3
"""Of lambda, by default: Network Slimming's order. 50 epochs on digits end at 96.7% with it, at 95.8% without the term,
and at 67.4% with the 0.167 that takes a gamma to 0 in so few steps (`rkl train --width 16`, with `--loss.l1 0`, with
`--loss.l1 0.167`)."""

CUTS = {"resnet-kl": (0.08, 0.16, 0.24)}
"""Shares of the epochs after which a model is cut by default: after 4, 8 and 12 of 50."""


def _in_utf8(name: object) -> bool:
    """Whether a run's files can hold a name. Python reads bytes of a path that are not UTF-8 as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in str(name))


IN_UTF8 = _in_utf8, "a name in UTF-8"
PATHS = ("out", "data", "data_root", "weights")

RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(PATHS, IN_UTF8),
    "seed": (lambda v: 0 <= v < 2**32, "at least 0 and below 2^32"),
    "image_size": (lambda v: 8 <= v <= 2**14, "between 8 and 16384"),
    "val_fraction": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "train_size": (lambda v: v >= 2, "at least 2"),
    "test_size": (lambda v: v >= 1, "at least 1"),
    "imbalance": (lambda v: 1 <= v < math.inf, "at least 1"),
    "cutmix_probability": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "mixup": (lambda v: v == 0 or 1e-30 <= v <= 1e30, "0 or between 1e-30 and 1e30"),  # drawn from in float32
    "cutout": (lambda v: v >= 0, "at least 0"),
    "erasing": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "width": (lambda v: 1 <= v <= 4096, "between 1 and 4096"),
    "feature_size": (lambda v: v >= 1, "at least 1"),
    "epochs": (lambda v: v >= 1, "at least 1"),
    "batch_size": (lambda v: v >= 2, "at least 2, as batch norm needs several samples"),
    "accumulate": (lambda v: v >= 1, "at least 1"),
    "lr": (lambda v: 0 < v < math.inf, "above 0"),
    "momentum": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "weight_decay": (lambda v: 0 <= v < math.inf, "at least 0"),
    "clip": (lambda v: 0 <= v < math.inf, "at least 0"),
    "warmup": (lambda v: 0 <= v < math.inf, "at least 0"),
    "ema": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "patience": (lambda v: v >= 0, "at least 0"),
    "prune_at": (lambda v: all(0 < share < 1 for share in v), "shares of the epochs, between 0 and 1"),
    "prune_ratio": (lambda v: 0 < v < 1, "between 0 and 1"),
    "prune_macs": (lambda v: 0 < v < 1, "between 0 and 1"),
    "devices": (lambda v: v >= 1, "at least 1"),
}
"""What a field's value must keep; a comparison with nan holds for none."""

_MAY_CHANGE = {"out", "data_root", "download", "compile", "on_nan"}
"""Fields that say where, how fast, and what to do where a run fails; not what is run."""


def is_other_run(key: str, then: object, now: object) -> bool:
    """Whether a run that began with ``then`` under ``key`` is another one with ``now``. Images may lie in another
    folder: their classes are looked at."""
    moved = key == "data" and all(isinstance(data, str) and data.startswith("folder:") for data in (then, now))
    return then != now and key not in _MAY_CHANGE and not moved


RECIPES: dict[str, dict[str, Any]] = {
    # Table I.
    "paper": {},
    # The protocol of the public self-distillation benchmarks on CIFAR-100.
    "strong": {"epochs": 200, "batch_size": 128, "lr": 0.1, "schedule": "cosine"},
    # Seconds, for tests: nothing is learnt to speak of.
    "smoke": {
        "epochs": 2,
        "batch_size": 64,
        "lr": 0.05,
        "width": 8,
        "train_size": 256,
        "test_size": 100,
        "image_size": 8,
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


@cache
def _checker() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def from_plain(plain: dict[str, Any], base: Config | None = None, source: str = "config") -> Config:
    """The configuration with the values of ``plain``, each turned into its field's type; the rest as in ``base``.

    Raises:
        ValueError: a key that does not exist, or a value of the wrong type or out of range.
    """
    base = base or Config()
    known = {f.name for f in fields(Config)}
    for key in plain:
        if key not in known:
            raise ValueError(f"{source}: keys must be fields of the configuration, got {reprlib.repr(key)}")
    values: dict[str, Any] = {
        key: at_home(value) if key in PATHS and isinstance(value, str) else value for key, value in plain.items()
    }
    if isinstance(values.get("loss"), dict):
        odd = set(values["loss"]) - {f.name for f in fields(LossWeights)}
        if odd:
            raise ValueError(f"{source}: keys of loss must be loss weights, got {sorted(map(str, odd))[0]!r}")
        values["loss"] = asdict(base.loss) | values["loss"]
    try:
        return _checker().validate_python(to_plain(base) | values)
    except ValidationError as error:
        raise ValueError(f"{source}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """The first complaint in one line: field, rule, value got."""
    first = error.errors()[0]
    if first["type"] == "value_error":  # our own, from __post_init__
        return str(first["ctx"]["error"])
    name = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and not part.startswith("function"))
    rule = first["msg"].replace("Input should be", "must be", 1)
    return f"{name} {rule}, got {reprlib.repr(first['input'])}"


class _WithoutAliases(yaml.SafeLoader):
    """Plain values only. A few lines of aliases of aliases would be gigabytes once they are printed or merged."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, which a configuration may not use")
        return super().compose_node(parent, index)


def read_plain(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        plain = _WithoutAliases(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ValueError(f"{path}: the configuration must be a readable file, got: {error.strerror}") from error
    # A value that is none of the type it names fails in whatever reads that type.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: the configuration must be YAML, got: {told(error)}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: the configuration must be a mapping of names to values, got {reprlib.repr(plain)}")
    return plain


def read_yaml(path: Path, base: Config | None = None) -> Config:
    """The configuration in a YAML file."""
    return from_plain(read_plain(path), base, str(path))
