"""What the experiments compare: rows, the factors in which two rows differ, the paper's tables, and sizes of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import CUTS, RECIPES


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        settings: the settings that the row changes in the configuration.
        macs_of, share: if given, the width is such that the row has ``share`` of that other row's multiply-accumulates.
        keep_width: whether the width stays, so that only cuts reach these multiply-accumulates.
    """

    settings: dict[str, Any]
    macs_of: str | None = None
    share: float = 1.0
    keep_width: bool = False


def _exits(loss: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return {"model": "resnet", "exits": True, **({"loss": loss} if loss else {}), **settings}


# One kernel size for each stage: a sum of three sizes costs most in the first stage, at full resolution, and gained
# nothing over 3x3 in short runs on held-out training images (85.5% both).
WIDE = {"model": "resnet-kl", "scale_mode": "stage"}
LATE = (0.4, 0.5, 0.6)

ROWS: dict[str, Row] = {
    "AlexNet": Row({"model": "alexnet"}),
    "VGG": Row({"model": "vgg"}),
    "ResNet18": Row({"model": "resnet18"}),
    "ResNet50": Row({"model": "resnet50"}),
    "DenseNet": Row({"model": "densenet"}),
    "GoogLeNet": Row({"model": "googlenet"}),
    "MobileNet": Row({"model": "mobilenet"}),
    "ShuffleNet": Row({"model": "shufflenet"}),
    "Xception": Row({"model": "xception"}),
    "RepLKNet": Row({"model": "replknet"}),
    "ResNet": Row({"model": "resnet"}),
    "ResNet + feature": Row(_exits({"heads": 0.0})),
    "ResNet + logic": Row(_exits({"beta": 0.0})),
    "ResNet + logic, T = 1": Row(_exits({"beta": 0.0, "temperature": 1.0, "t_squared": False})),
    "ResNet + both": Row(_exits()),
    "ResNet + both, heads 0.5": Row(_exits({"heads": 0.5})),
    "ResNet + deep supervision": Row(_exits({"x": 0.0, "beta": 0.0})),
    "ResNet without CutMix": Row({"model": "resnet", "cutmix": False}),
    "ResNet + T-ReLU": Row({"model": "resnet", "activation": "trelu"}),
    "ResNet + separable": Row({"model": "resnet", "separable": True}),
    "ResNet + multi-scale": Row({"model": "resnet", "separable": True, "scales": (3, 5, 7)}),
    "ResNet + gate": Row({"model": "resnet", "gate": "light"}),
    "ResNet-KL": Row({"model": "resnet-kl"}),
    "ResNet at ResNet-KL's MACs": Row({"model": "resnet"}, macs_of="ResNet-KL"),
    "ResNet-KL unpruned": Row({"model": "resnet-kl", "prune_at": ()}),
    "ResNet-KL cut late": Row({"model": "resnet-kl", "prune_at": LATE}),
    "ResNet-KL cut by Taylor": Row({"model": "resnet-kl", "importance": "taylor"}),
    "ResNet-KL with ReLU": Row({"model": "resnet-kl", "prune_at": (), "activation": "relu"}),
    "ResNet-KL without gate": Row({"model": "resnet-kl", "prune_at": (), "gate": "none", "exit_gate": "none"}),
    "ResNet-KL without exits": Row({"model": "resnet-kl", "prune_at": (), "exits": False}),
    "ResNet at half MACs": Row({"model": "resnet"}, macs_of="ResNet", share=0.5),
    "ResNet-KL at half MACs": Row(WIDE, macs_of="ResNet at half MACs"),
    "ResNet-KL, dense early, at half MACs": Row(WIDE | {"dense_stages": 2}, macs_of="ResNet at half MACs"),
    "ResNet + both, pruned to half": Row(
        _exits(prune_at=CUTS["resnet-kl"]), macs_of="ResNet at half MACs", keep_width=True
    ),
    "ResNet-KL at ResNet's MACs": Row(WIDE, macs_of="ResNet"),
}
"""Every row by its name. Settings that a row does not have come from the scale and are the same for all."""


@dataclass(frozen=True)
class Factor:
    """One ingredient or claim: a row that has it, and a row that differs in nothing else or has equal compute.

    Headlines stand on top of the page. They were named before the runs.
    """

    name: str
    row: str
    against: str
    headline: bool = False


FACTORS = (
    Factor("both distillations", "ResNet + both", "ResNet", headline=True),
    Factor("ResNet-KL at half of ResNet's compute", "ResNet-KL at half MACs", "ResNet at half MACs", headline=True),
    Factor("ResNet-KL at ResNet's own compute", "ResNet-KL at ResNet's MACs", "ResNet", headline=True),
    Factor(
        "the distilled ResNet pruned to half", "ResNet + both, pruned to half", "ResNet at half MACs", headline=True
    ),
    Factor("ResNet-KL as in the paper, equal compute", "ResNet-KL", "ResNet at ResNet-KL's MACs", headline=True),
    Factor("dense early stages", "ResNet-KL, dense early, at half MACs", "ResNet-KL at half MACs"),
    Factor("T-ReLU for ReLU", "ResNet + T-ReLU", "ResNet"),
    Factor("T-ReLU for ReLU in ResNet-KL", "ResNet-KL unpruned", "ResNet-KL with ReLU"),
    Factor("separable for dense convolutions", "ResNet + separable", "ResNet"),
    Factor("multi-scale 3 + 5 + 7 for 3", "ResNet + multi-scale", "ResNet + separable"),
    Factor("the gate", "ResNet + gate", "ResNet"),
    Factor("the gate in ResNet-KL", "ResNet-KL unpruned", "ResNet-KL without gate"),
    Factor("CutMix", "ResNet", "ResNet without CutMix"),
    Factor("deep supervision alone (x = 0)", "ResNet + deep supervision", "ResNet"),
    Factor("feature distillation", "ResNet + feature", "ResNet"),
    Factor("logit distillation with deep supervision", "ResNet + logic", "ResNet"),
    Factor("logit distillation beside deep supervision", "ResNet + logic", "ResNet + deep supervision"),
    Factor("T = 3 with T^2 for T = 1 without", "ResNet + logic", "ResNet + logic, T = 1"),
    Factor("heads at half their weight", "ResNet + both, heads 0.5", "ResNet + both"),
    Factor("self-distillation on ResNet-KL's backbone", "ResNet-KL unpruned", "ResNet-KL without exits"),
    Factor("pruning", "ResNet-KL", "ResNet-KL unpruned"),
    Factor("late cuts for early ones", "ResNet-KL cut late", "ResNet-KL"),
    Factor("Taylor importance for magnitude", "ResNet-KL cut by Taylor", "ResNet-KL"),
)


@dataclass(frozen=True)
class Table:
    """One table: the paper's data set for it, and its rows. All FACTORS whose two rows it has are compared."""

    title: str
    data: str
    rows: tuple[str, ...]


EQUAL_COMPUTE = (
    "ResNet-KL",
    "ResNet at ResNet-KL's MACs",
    "ResNet-KL at half MACs",
    "ResNet at half MACs",
    "ResNet-KL at ResNet's MACs",
    "ResNet",
)
"""Every ResNet-KL, each with a plain ResNet of the same multiply-accumulates."""

TABLES = {
    "table2": Table(
        "Table II",
        "cifar100",
        (
            *("ResNet18", "AlexNet", "VGG", "DenseNet", "GoogLeNet", "MobileNet", "Xception", "RepLKNet"),
            *EQUAL_COMPUTE,
        ),
    ),
    "table3": Table("Table III", "cifar10", ("VGG", "ResNet18", "ShuffleNet", "Xception", "ResNet50", *EQUAL_COMPUTE)),
    "table4": Table("Table IV", "stl10", ("VGG", "ResNet18", "ShuffleNet", "Xception", *EQUAL_COMPUTE)),
    "table5": Table(
        "Table V",
        "cifar10",
        (
            *("ResNet", "ResNet + feature", "ResNet + logic", "ResNet + both", "ResNet + both, pruned to half"),
            *EQUAL_COMPUTE[:-1],
        ),
    ),
    "factors": Table(
        "One factor at a time", "cifar10", tuple(dict.fromkeys(name for f in FACTORS for name in (f.against, f.row)))
    ),
}


@dataclass(frozen=True)
class Scale:
    """The size of a table's runs, and the number of seeds for each row."""

    settings: dict[str, Any]
    seeds: int


SCALES = {
    "smoke": Scale(
        {"epochs": 2, "batch_size": 16, "width": 8, "train_size": 60, "test_size": 30, "val_fraction": 0.3}, 1
    ),
    # CutMix only, as in the paper: crops and mirrors do not help in so short a run. After 560 steps on 6,000
    # Fashion-MNIST images ResNet got 80.3% of held-out training images right with both, 85.3% with mirrors, 86.7% with
    # neither. Batches are small, for more steps. With lr 0.05, 0.1 and 0.2 ResNet got 86.7, 86.8 and 85.4%.
    # With six epochs, the ten rows of table V take about half an hour per seed on two cores.
    "cpu": Scale(
        {
            "epochs": 6,
            "batch_size": 64,
            "lr": 0.1,
            "schedule": "cosine",
            "augment": "none",
            "width": 16,
            "train_size": 10_000,
        },
        3,
    ),
    # The settings of the trial on one GPU that decided the claims, with more epochs.
    "full": Scale(
        RECIPES["paper"] | {"epochs": 100, "batch_size": 512, "lr": 0.3, "schedule": "cosine", "warmup": 2.0}, 5
    ),
}
"""smoke: takes seconds for a row and learns nothing. cpu: for two cores. full: for one GPU, with all images. If a data
set has fewer images than a scale says, all are taken."""
