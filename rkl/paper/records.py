"""Reads the records of an experiment's runs. All of the report's own figures come from here."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AwareDatetime, Field, TypeAdapter
from typing_extensions import Required, TypedDict

from ..config import read_plain
from ..training.files import RunError, read_json, read_lines, read_record, understood
from .comparison import Estimate, estimate, paired_difference
from .rows import TABLES

APART = timedelta(days=2)
"""Training times are compared only if the runs ended within this time. Over longer times load and code may change."""
RECORD = "a record of `rkl experiments`"
"""What error messages call a table's JSON file."""


class Exit(TypedDict):
    """The metrics of one head."""

    accuracy: float
    recall: float
    f1: float
    nll: float
    ece: float


class Size(TypedDict):
    """The size of a finished model."""

    parameters: int
    deployed_parameters: int
    macs: int


class Metrics(TypedDict, total=False):
    """What the page needs of metrics.json. Old records lack the entries that are not required."""

    seed: Required[int]
    test: Required[Annotated[list[Exit], Field(min_length=1)]]
    test_images: Required[int]
    test_looked_at: AwareDatetime
    tested: str
    training_loss: Required[Annotated[dict[str, float], Field(min_length=1)]]
    size: Required[Size]
    plan: dict[str, list[int]]
    image: tuple[int, int]
    seconds: Required[float]
    data_share: Required[float]
    peak_memory_bytes: Required[int]
    device: Required[str]
    confusion: Required[list[list[int]]]
    classes: Required[list[str]]


class Epoch(TypedDict):
    """What the page needs of a line of log.jsonl."""

    epoch: int
    val: list[Exit]


class Shares(TypedDict):
    """What the page needs of gradients.json."""

    shares: dict[str, float]


class Weights(TypedDict):
    """What the page needs of the weights of the loss."""

    heads: float


class Settings(TypedDict):
    """What the page needs of config.yaml."""

    width: int
    train_size: int | None
    val_fraction: float
    epochs: int
    batch_size: int
    lr: float
    schedule: str
    augment: Literal["none", "standard", "trivial"]
    cutmix: bool
    loss: Weights


@cache
def _checker(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _read(file: Path, read: Callable[[Path], Any], kind: Any) -> Any:
    """What ``read`` finds in the file. It must have the entries of ``kind``."""
    content = read(file)
    with understood(file, "a finished run's"):
        _checker(kind).validate_python(content)
    return content


@dataclass(frozen=True)
class Run:
    """One finished run: its settings, metrics.json, the lines of log.jsonl, gradients.json, and when it ended, which is
    when its test images were looked at. That time is None in old records, which lack it."""

    seed: int
    config: dict[str, Any]
    metrics: dict[str, Any]
    epochs: list[dict[str, Any]]
    gradients: dict[str, dict[str, float]]
    looked_at: datetime | None = None

    @property
    def deepest(self) -> dict[str, float]:
        """The metrics of the deepest head on the test images."""
        return self.metrics["test"][-1]


@dataclass(frozen=True)
class Results:
    """One table's finished runs, by row, in the table's order. Rows without finished runs are left out."""

    table: str
    data: str
    scale: str
    rows: dict[str, list[Run]]
    planned: int

    @cached_property
    def finished(self) -> int:
        return sum(len(runs) for runs in self.rows.values())

    def over_seeds(self, row: str, value: Callable[[Run], float]) -> Estimate:
        """Mean and interval of a value over a row's runs."""
        return estimate([value(run) for run in self.rows[row]])

    def difference(self, row: str, against: str, value: Callable[[Run], float]) -> Estimate | None:
        """``row`` minus ``against``, over the seeds that both have; None if a row is missing or they share no seed."""
        if row not in self.rows or against not in self.rows:
            return None
        ours, theirs = ({run.seed: value(run) for run in self.rows[name]} for name in (row, against))
        return paired_difference(ours, theirs)

    def together(self, *rows: str) -> bool:
        """Whether each run of two rows ended within APART of a run of the other row, so that their times compare."""
        ours, theirs = ([run.looked_at for run in self.rows[row]] for row in rows)

        def beside(moment: datetime | None, others: list[datetime | None]) -> bool:
            return any(moment and other and abs(moment - other) <= APART for other in others)

        return all(beside(one, theirs) for one in ours) and all(beside(one, ours) for one in theirs)


def load_results(folder: Path) -> list[Results]:
    """Every experiment recorded in a folder of `rkl experiments`, tables in their order.

    Raises:
        RunError: no record in the folder, or none with a finished run.
    """
    records = sorted(folder.glob("*.json"), key=lambda path: (path.name.startswith("factors"), path.name))
    results = [_load(folder, path) for path in records]
    results = [result for result in results if result.rows]
    if not results:
        raise RunError(f"{folder}: must hold finished runs of `rkl experiments`, got none")
    return results


def read_plan(file: Path) -> dict[str, Any]:
    """A table's JSON file: its data, its scale and the folders of its runs.

    Raises:
        RunError: it is damaged, or no such record.
    """
    record, folder = read_json(file, RECORD), file.parent
    with understood(file, RECORD):
        plan = {name: record[name] for name in ("rows", "table", "data", "scale")}
        for run in (run for runs in plan["rows"].values() for run in runs):
            if not (folder / run).resolve().is_relative_to(folder.resolve()):
                raise RunError(f"{file}: runs must be folders below {folder}, got {run!r}")
        if plan["table"] not in TABLES:
            raise RunError(f"{file}: table must be one of {', '.join(TABLES)}, got {reprlib.repr(plan['table'])}")
    return plan


def _load(folder: Path, file: Path) -> Results:
    plan, rows = read_plan(file), {}
    for row, runs in plan["rows"].items():
        finished = [_load_run(folder / run) for run in runs if (folder / run / "gradients.json").exists()]
        if finished:
            rows[row] = finished
    planned = sum(len(runs) for runs in plan["rows"].values())
    return Results(plan["table"], plan["data"], plan["scale"], rows, planned)


def _load_run(folder: Path) -> Run:
    metrics = _read(folder / "metrics.json", read_record, Metrics)
    gradients = _read(folder / "gradients.json", read_record, Shares)
    epochs = _read(folder / "log.jsonl", read_lines, Annotated[list[Epoch], Field(min_length=1)])
    config = _read(folder / "config.yaml", read_plain, Settings)
    moment = metrics.get("test_looked_at")
    with understood(folder / "metrics.json", "a finished run's"):
        looked_at = None if moment is None else datetime.fromisoformat(moment)
    return Run(metrics["seed"], config, metrics, epochs, gradients, looked_at)


def published() -> dict[str, Any]:
    """The figures that others have published (published.yaml)."""
    return yaml.safe_load(resources.files("rkl.paper").joinpath("published.yaml").read_text())
