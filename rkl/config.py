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
from .plain_yaml import PlainLoader, place

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Decay = Literal["filters", "all"]


@dataclass(frozen=True)
class RunSettings:
    """Where the run is written, and its seed."""

    out: Path = Path("runs/default")
    """Folder of the run."""
    seed: int = 0
    """Determines the initial values, the validation split and every batch."""


@dataclass(frozen=True)
class DataSettings:
    """The images, and how they are drawn and augmented."""

    data: str = "digits"
    """Name of the data set; `rkl info --datasets` lists all names."""
    data_root: Path | None = None
    """Folder of the data set's files; by default the usual folders are searched."""
    image_size: int | None = None
    """Height and width of the images in pixels; the data set's own by default."""
    val_fraction: float = 0.1
    """Share of the training images that is held out for validation; 0 trains on all of them. A folder of images that
    has validation images of its own ignores it."""
    train_size: int | None = None
    """Number of training images to use, validation included, the same for every seed; all by default."""
    test_size: int | None = None
    """Number of test images to use, the same for every seed; all by default."""
    imbalance: float = 100.0
    """For long-tailed data sets (-lt): images of the first class divided by images of the last."""
    download: bool = False
    """Download missing files of the data set into data_root."""
    augment: Literal["none", "standard", "trivial"] = "standard"
    """standard: random crops, and flips if the classes allow it; trivial: TrivialAugment as well."""
    cutmix: bool = True
    """Mix the images of a batch with each other by CutMix (equation 1)."""
    cutmix_probability: float = 1.0
    """Probability that a batch gets CutMix; the other batches get mixup if it is on."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 turns mixup off."""
    cutout: int = 0
    """Side in pixels of a square that is blanked in each image; 0 turns Cutout off."""
    erasing: float = 0.0
    """Probability that a random rectangle of an image is blanked."""
    sampling: Literal["natural", "balanced"] = "natural"
    """balanced: draw every class equally often."""
    class_weights: bool = False
    """Weight the classes by their inverse frequency in the cross entropy."""


@dataclass(frozen=True)
class ModelSettings:
    """The network."""

    model: str = "resnet-kl"
    """Name of the model; `rkl info --models` lists all names."""
    depth: int = 18
    """Depth of the network: 18, 34 or 50."""
    width: int = 64
    """Channels of the first stage."""
    separable: bool | None = None
    """Separable instead of dense 3x3 convolutions. The default of this and the next six is the model's own."""
    dense_stages: int | None = None
    """Number of early stages that stay dense if the others are separable."""
    scales: tuple[int, ...] | None = None
    """Kernel sizes of the depthwise step."""
    scale_mode: ScaleMode | None = None
    """sum: all sizes added up in every channel; mixed: one size for each channel; stage: one size for each stage."""
    gate: GateKind | None = None
    """Kind of gate in the blocks."""
    activation: ActivationName | None = None
    """Activation: T-ReLU or ReLU."""
    exits: bool | None = None
    """Put a head after every stage."""
    exit_gate: GateKind = "light"
    """Kind of gate in the shallow heads."""
    feature_size: int | None = None
    """Height and width of the feature maps that are compared; the deepest stage's by default."""
    weights: Path | None = None
    """Folder of a run whose last weights training starts from; heads for other classes start at random."""


@dataclass(frozen=True)
class TrainingSettings:
    """How the network is trained: SGD, its schedule and its end."""

    epochs: int = 50
    """Passes over the training images."""
    batch_size: int = 256
    """Images in a forward pass on each device."""
    accumulate: int = 1
    """Batches on each device whose gradients make one step."""
    lr: float = 0.01
    """Learning rate before any decay."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = False
    """Use Nesterov's momentum."""
    weight_decay: float = 5e-4
    """SGD's weight decay."""
    decay: Decay = "filters"
    """filters: decay only dense and pointwise filters; all: norms, biases and depthwise filters too."""
    clip: float = 0.0
    """Largest norm of a step's gradient, by clipping; 0 turns clipping off."""
    on_nan: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is not finite, end the run, or skip the step and count it in the log."""
    schedule: Literal["thirds", "cosine"] = "thirds"
    """thirds: divide the rate by 10 after each third of the epochs; cosine: half a cosine."""
    warmup: float = 0.0
    """Epochs in which the learning rate rises linearly to its value."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then evaluated; 0 keeps none."""
    patience: int = 0
    """Stop after this many epochs without a better validation accuracy, all after the last cut; 0 never stops early."""
    test_with: Literal["last", "best"] = "last"
    """Epoch whose model is tested, once: the last one, or the best by validation since the last cut."""


@dataclass(frozen=True)
class PruningSettings:
    """When and how channels are cut while the network trains."""

    prune_at: tuple[float, ...] | None = None
    """Shares of the epochs after which channels are cut; 0.08 0.16 0.24 by default for resnet-kl, else none."""
    prune_ratio: float = 0.2
    """Largest share of a group's channels that one cut removes."""
    prune_macs: float | None = None
    """Largest share of the first model's multiply-accumulates that the last cut leaves. Each cut leaves the same share
    of what it finds. Replaces prune_ratio."""
    importance: Literal["magnitude", "taylor"] = "magnitude"
    """How channels are ranked for a cut. magnitude: L1 norm of filters plus |gamma|; taylor: first-order change of the
    loss without the channel."""


@dataclass(frozen=True)
class MachineSettings:
    """How the run uses the machine."""

    precision: Precision | None = None
    """Precision of training; by default bf16-mixed on a GPU and 32-true elsewhere."""
    compile: bool = False
    """Compile the model with torch.compile; on a GPU, if accumulate is 1, into CUDA graphs, from which small
    models gain most."""
    devices: int = 1
    """Number of devices to train on; several use DistributedDataParallel."""
    channels_last: bool = True
    """Keep images and feature maps in channels-last (NHWC) order, which the kernels prefer."""


Part = TypeVar("Part", RunSettings, DataSettings, ModelSettings, TrainingSettings, PruningSettings, MachineSettings)


@dataclass(frozen=True)
class Config(MachineSettings, PruningSettings, TrainingSettings, ModelSettings, DataSettings, RunSettings):
    """All settings that decide a run's result. They and the data are all that is needed to reproduce it."""

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
        """The settings of one subject, which is one group of command line options."""
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind)})

    @property
    def cut_epochs(self) -> list[int]:
        """The numbers of epochs after which channels are cut. There is at most one cut after an epoch, and at least the
        last epoch is left to recover in."""
        shares = CUTS.get(self.model, ()) if self.prune_at is None else self.prune_at
        return sorted({min(max(1, round(share * self.epochs)), self.epochs - 1) for share in shares} - {0})

    def learning_rate(self, progress: float) -> float:
        """The learning rate after ``progress`` epochs, by the schedule, with linear warm-up."""
        warm = min(1.0, progress / self.warmup) if self.warmup else 1.0
        share = progress / self.epochs
        if self.schedule == "thirds":
            return self.lr * warm * 0.1 ** int(3 * share + 1e-9)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * share))

    def l1_at(self, epoch: int, steps: int) -> float:
        """The weight of the L1 term (lambda) in epoch ``epoch``, counted from 0, of ``steps`` steps. The term prepares
        the cuts. It acts until the last cut and, by default, not at all in a run without cuts.

        The default moves a gamma that no other gradient holds from 1, its initial value, to 0 by the last cut. So the
        gammas spread, and the cuts can rank them. A gamma moves by lambda * learning rate * steps / (1 - momentum). The
        default is at most MOST_L1, since in a short run it would be stronger than the gradients of the loss.
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
        """The options of the model's blocks. Settings that are None come from ``defaults``."""
        chosen = {f.name: getattr(self, f.name) for f in fields(BlockOptions)}
        return replace(defaults, **{name: value for name, value in chosen.items() if value is not None})


MOST_L1 = 1e-3
"""The largest default lambda, of Network Slimming's order. 50 epochs on digits end at 96.7% with it, at 95.8% without
the term, and at 67.4% with 0.167, which takes a gamma to 0 in so few steps (`rkl train --width 16`, then the same with
`--loss.l1 0` and with `--loss.l1 0.167`)."""

CUTS = {"resnet-kl": (0.08, 0.16, 0.24)}
"""For each model, the shares of the epochs after which it is cut by default: after 4, 8 and 12 of 50 epochs."""


def _in_utf8(name: object) -> bool:
    """Whether a run's files can hold a name. Python decodes a path's bytes that are not UTF-8 to lone surrogates."""
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
    "feature_size": (lambda v: 1 <= v <= 2**14, "between 1 and 16384"),
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
"""For each field, a condition on its value and the condition in words. nan meets none of the numeric conditions."""

_MAY_CHANGE = {"out", "data_root", "download", "compile", "on_nan"}
"""Fields that say where and how fast a run trains and what to do if it fails, but not what it trains."""


def is_other_run(key: str, then: object, now: object) -> bool:
    """Whether the value ``now`` of setting ``key`` makes a run another one than its value ``then``. A folder of images
    may have moved: the classes and images in it are compared elsewhere."""
    moved = key == "data" and all(isinstance(data, str) and data.startswith("folder:") for data in (then, now))
    return then != now and key not in _MAY_CHANGE and not moved


RECIPES: dict[str, dict[str, Any]] = {
    # Table I.
    "paper": {},
    # The protocol of the public self-distillation benchmarks on CIFAR-100.
    "strong": {"epochs": 200, "batch_size": 128, "lr": 0.1, "schedule": "cosine"},
    # Takes seconds, for tests. It learns next to nothing.
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
    """The configuration in types that YAML and JSON have."""
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
    """The configuration with the values of ``plain``, converted to their fields' types. The rest comes from ``base``.

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
    """The first error in one line: field, rule, value got."""
    first = error.errors()[0]
    if first["type"] == "value_error":  # our own, from __post_init__
        return str(first["ctx"]["error"])
    name = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and not part.startswith("function"))
    rule = first["msg"].replace("Input should be", "must be", 1)
    return f"{name} {rule}, got {reprlib.repr(first['input'])}"


def read_plain(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        plain = PlainLoader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise ValueError(f"{path}: the configuration must be a readable file, got: {error.strerror}") from error
    # A value that does not fit its YAML tag raises whatever error the constructor of that type raises.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: the configuration must be YAML, got: {place(error) or told(error)}") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{path}: the configuration must be a mapping of names to values, got {reprlib.repr(plain)}")
    return plain


def read_yaml(path: Path, base: Config | None = None) -> Config:
    """The configuration in a YAML file."""
    return from_plain(read_plain(path), base, str(path))
