"""The paper's tables and one-factor comparisons as sets of runs: which rows, at which size, in which folders.

A cell is one row trained with one seed, in its own folder and its own process; rows that several tables share are
trained once. Seed s gives every row the same validation split and the same batches, so differences between rows are
paired. Whatever is finished is kept, so an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from .checkpoint import RunError, write_text
from .config import RECIPES, Config, from_plain, read_yaml, to_plain
from .gradients import record_gradients
from .run_log import MAY_CHANGE
from .train import load_data, train

PRUNED = {"prune_at": RECIPES["paper"]["prune_at"]}


@dataclass(frozen=True)
class Row:
    """One row of a table: what it changes of the configuration, and how much wider than the others it is."""

    settings: dict[str, Any]
    wider: float = 1.0


def _loss(**weights: float) -> dict[str, Any]:
    return {"model": "resnet", "exits": True, "loss": weights}


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
    "ResNet + feature": Row(_loss(heads=0.0)),
    "ResNet + logic": Row(_loss(beta=0.0)),
    "ResNet + both": Row(_loss()),
    "ResNet + deep supervision": Row(_loss(x=0.0, beta=0.0)),
    "ResNet without CutMix": Row({"model": "resnet", "cutmix": False}),
    "ResNet + T-ReLU": Row({"model": "resnet", "activation": "trelu"}),
    "ResNet + separable": Row({"model": "resnet", "separable": True}),
    "ResNet + multi-scale": Row({"model": "resnet", "separable": True, "scales": (3, 5, 7)}),
    "ResNet + gate": Row({"model": "resnet", "gate": "light"}),
    "ResNet-KL": Row({"model": "resnet-kl", **PRUNED}),
    "ResNet-KL unpruned": Row({"model": "resnet-kl"}),
    "ResNet-KL with ReLU": Row({"model": "resnet-kl", "activation": "relu"}),
    "ResNet-KL without exits": Row({"model": "resnet-kl", "exits": False}),
    # Separable convolutions free most of the parameters and multiply-accumulates; this row spends them on width, down
    # to half of what ResNet takes at width 16. One kernel size a stage: the sum of three costs most in the first stage,
    # at full resolution, and gained nothing over 3x3 in short runs on held-out training images (85.5% both).
    "ResNet-KL at half MACs": Row(
        {"model": "resnet-kl", "scale_mode": "stage", **PRUNED, "prune_macs": 0.667}, wider=2
    ),
}
"""Every row by its name; what a row does not set is the scale's, the same for all."""


@dataclass(frozen=True)
class Factor:
    """One ingredient: the row that has it against the row that differs in nothing else."""

    name: str
    row: str
    against: str


FACTORS = (
    Factor("T-ReLU for ReLU", "ResNet + T-ReLU", "ResNet"),
    Factor("T-ReLU for ReLU in ResNet-KL", "ResNet-KL unpruned", "ResNet-KL with ReLU"),
    Factor("separable for dense convolutions", "ResNet + separable", "ResNet"),
    Factor("multi-scale 3 + 5 + 7 for 3", "ResNet + multi-scale", "ResNet + separable"),
    Factor("the gate", "ResNet + gate", "ResNet"),
    Factor("CutMix", "ResNet", "ResNet without CutMix"),
    Factor("deep supervision alone (x = 0)", "ResNet + deep supervision", "ResNet"),
    Factor("feature distillation", "ResNet + feature", "ResNet"),
    Factor("logic distillation with deep supervision", "ResNet + logic", "ResNet"),
    Factor("logic distillation beside deep supervision", "ResNet + logic", "ResNet + deep supervision"),
    Factor("both distillations", "ResNet + both", "ResNet"),
    Factor("self-distillation on ResNet-KL's backbone", "ResNet-KL unpruned", "ResNet-KL without exits"),
    Factor("pruning", "ResNet-KL", "ResNet-KL unpruned"),
    Factor("all of ResNet-KL", "ResNet-KL", "ResNet"),
    Factor(
        "all of ResNet-KL, as wide as half of ResNet's multiply-accumulates allow", "ResNet-KL at half MACs", "ResNet"
    ),
)


@dataclass(frozen=True)
class Table:
    """One table: the paper's data set for it and its rows; every comparison among FACTORS that they allow is made."""

    title: str
    data: str
    rows: tuple[str, ...]


TABLES = {
    "table2": Table(
        "Table II",
        "cifar100",
        (
            *("ResNet18", "AlexNet", "VGG", "DenseNet", "GoogLeNet", "MobileNet", "Xception", "RepLKNet"),
            *("ResNet-KL", "ResNet-KL at half MACs"),
        ),
    ),
    "table3": Table(
        "Table III",
        "cifar10",
        ("VGG", "ResNet18", "ShuffleNet", "Xception", "ResNet50", "ResNet-KL", "ResNet-KL at half MACs"),
    ),
    "table4": Table(
        "Table IV", "stl10", ("VGG", "ResNet18", "ShuffleNet", "Xception", "ResNet-KL", "ResNet-KL at half MACs")
    ),
    "table5": Table(
        "Table V",
        "cifar10",
        ("ResNet", "ResNet + feature", "ResNet + logic", "ResNet + both", "ResNet-KL", "ResNet-KL at half MACs"),
    ),
    "factors": Table(
        "One factor at a time", "cifar10", tuple(dict.fromkeys(name for f in FACTORS for name in (f.against, f.row)))
    ),
}


@dataclass(frozen=True)
class Scale:
    """How large the runs of a table are, and how many seeds each row gets."""

    settings: dict[str, Any]
    seeds: int


SCALES = {
    "smoke": Scale(
        {"epochs": 1, "batch_size": 16, "width": 8, "train_size": 60, "test_size": 30, "val_fraction": 0.3}, 1
    ),
    # CutMix alone, as in the paper: a run this short cannot use crops and mirrors beside it. After 560 steps on 6,000
    # Fashion-MNIST images ResNet got 80.3% of held-out training images right with both, 85.3% with mirrors, 86.7% with
    # neither. Small batches, as steps are what is short; with lr 0.05, 0.1 and 0.2 ResNet got 86.7, 86.8 and 85.4%.
    "cpu": Scale(
        {
            "epochs": 12,
            "batch_size": 64,
            "lr": 0.1,
            "schedule": "cosine",
            "augment": "none",
            "width": 16,
            "train_size": 10_000,
        },
        3,
    ),
    "full": Scale(RECIPES["paper"] | {"prune_at": ()}, 5),
}
"""smoke: seconds a row, learns nothing. cpu: two cores. full: table I's recipe on all images."""


@dataclass(frozen=True)
class Experiment:
    """A table on a data set at a size: what `rkl experiments` runs and the record that `rkl report` reads."""

    table: str
    data: str
    scale: str
    seeds: int
    out: Path
    overrides: dict[str, Any] = field(default_factory=dict)

    def folder(self, row: str, seed: int) -> Path:
        """Of one cell's run."""
        return self.out / "runs" / slug(self.data) / slug(row) / f"seed-{seed}"

    def config(self, row: str, seed: int) -> Config:
        """Of one cell: the scale's settings, then the caller's, then the row's own."""
        base = from_plain(SCALES[self.scale].settings | self.overrides, source="experiment")
        config = from_plain(ROWS[row].settings, base, source=row)
        width = round(config.width * ROWS[row].wider / 4) * 4
        return replace(config, data=self.data, seed=seed, out=self.folder(row, seed), width=width)

    @property
    def record(self) -> Path:
        return self.out / f"{self.table}-{slug(self.data)}.json"


def slug(name: str) -> str:
    """A name as a folder's: lower case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def experiment(
    table: str, scale: str, out: Path, data: str | None = None, seeds: int | None = None, **overrides: Any
) -> Experiment:
    """Settle what a table's command left open.

    Raises:
        ValueError: an unknown table or scale, or no seed at all.
    """
    for name, value, known in (("table", table, TABLES), ("scale", scale, SCALES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    return Experiment(table, data or TABLES[table].data, scale, seeds or SCALES[scale].seeds, out, overrides)


def read_overrides(path: Path) -> dict[str, Any]:
    """The settings that a YAML file gives, checked as those of a run are."""
    read_yaml(path)
    return yaml.safe_load(path.read_text())


def run(
    plan: Experiment,
    jobs: int | None = None,
    announce: Callable[[str], None] = print,
    only: Sequence[str] | None = None,
) -> Path:
    """Train every cell that is not finished, ``jobs`` at a time, and record the plan.

    By default there is one job a GPU; without one, a job for each of torch's threads, as layers this small gain little
    from threads.

    Args:
        only: the rows to train now; all of the table's by default. The record is of the whole table either way.

    Returns:
        The plan's record; :func:`rkl.tables.write` makes the page from it.

    Raises:
        RunError: a folder holds a run of other settings, or cells failed; the others are finished all the same.
        ValueError: ``only`` names a row that the table does not have.
    """
    rows = TABLES[plan.table].rows
    for row in only or ():
        if row not in rows:
            raise ValueError(f"rows must be of {plan.table}'s: {', '.join(rows)}; got {row!r}")
    # Seed by seed: a stop leaves whole pairs.
    cells = [(row, seed) for seed in range(plan.seeds) for row in only or rows]
    configs = {cell: plan.config(*cell) for cell in cells}
    open_cells = [cell for cell in cells if not _finished(configs[cell])]
    if open_cells:
        load_data(configs[open_cells[0]])  # what is wrong with the data is said once, before any run
    write_text(
        plan.record,
        json.dumps(
            {
                "table": plan.table,
                "data": plan.data,
                "scale": plan.scale,
                "rows": {
                    row: [str(plan.folder(row, s).relative_to(plan.out)) for s in range(plan.seeds)] for row in rows
                },
            },
            indent=1,
        ),
    )
    announce(
        f"{TABLES[plan.table].title} on {plan.data}: {len(cells)} runs, {len(cells) - len(open_cells)} done before"
    )
    gpus = torch.cuda.device_count()
    jobs = jobs or gpus or torch.get_num_threads()
    threads = max(1, torch.get_num_threads() // jobs)
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for job in range(jobs):
        free.put(job)

    def train_cell(cell: tuple[str, int]) -> str | None:
        job = free.get()
        try:
            error = _in_own_process(configs[cell], device=job % gpus if gpus else None, threads=threads)
        finally:
            free.put(job)
        announce(f"{cell[0]}, seed {cell[1]}: {error or 'done'}")
        return error and f"{cell[0]}, seed {cell[1]}: {error}"

    with ThreadPoolExecutor(jobs) as pool:
        errors = [error for error in pool.map(train_cell, open_cells) if error]
    if errors:
        raise RunError(f"{len(errors)} of {len(cells)} runs failed, the first: {errors[0]}")
    return plan.record


def _finished(config: Config) -> bool:
    """Whether a cell's record is there, of these very settings."""
    if not (config.out / "gradients.json").exists():
        return False
    then, now = to_plain(read_yaml(config.out / "config.yaml")), to_plain(config)
    for key in now:
        if then.get(key) != now[key] and key not in MAY_CHANGE:
            raise RunError(
                f"{config.out}: holds a run with {key} {then.get(key)!r}, want {now[key]!r}; give another out"
            )
    return True


SLOW_IMPORTS = ("matplotlib.backends.backend_agg", "sklearn.datasets", "timm", "torchvision.models")


def _in_own_process(config: Config, device: int | None, threads: int) -> str | None:
    """Train one cell in a process of its own, so that its peak memory is its own; the error in one line, or None.

    The process is forked from a server that has the imports done and no thread started, which saves seconds a cell.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rkl.experiments", *SLOW_IMPORTS])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train_cell, args=(to_plain(config), device, threads, sender))
    process.start()
    sender.close()
    try:
        error = receiver.recv()
    except EOFError:
        process.join()
        error = f"the process ended with code {process.exitcode}"
    process.join()
    return error


def _train_cell(plain: dict[str, Any], device: int | None, threads: int, sender: Any) -> None:
    """What the cell's process does: train (or go on), then measure the loss terms' gradients."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    torch.set_num_threads(threads)
    config = from_plain(plain)
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "output.txt").open("a") as output:
        sys.stdout = sys.stderr = output
        try:
            if not (config.out / "metrics.json").exists():
                train(config, resume=True)
            record_gradients(config.out)
            sender.send(None)
        except Exception as error:
            traceback.print_exc(file=output)
            reason = (str(error).splitlines() or [""])[0]
            sender.send(f"{type(error).__name__}: {reason} (see {config.out / 'output.txt'})")
