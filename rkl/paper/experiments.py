"""The paper's tables and one-factor comparisons (:mod:`rkl.paper.rows`) as sets of runs in folders.

A cell is one row trained with one seed, in its own folder and its own process. Rows that several tables share are
trained once. A seed gives every row the same validation split, the same batches and, in layers that rows share, the
same initial values. So differences between rows are paired. Finished work is kept, so an interrupted command goes on
where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..config import Config, from_plain, is_other_run, read_plain, read_yaml, to_plain
from ..data import DataError
from ..ignored import check_ignored, without_ignored
from ..paths import check_apart
from ..training.files import RunError, read_json, understood, write_text
from ..training.guard import check_cutout, check_cuts
from ..training.images import check_data, load_data
from ..training.learner import new_model
from ..training.run_log import RunLog
from ..training.train import steps_an_epoch
from . import cells
from .cells import Cell
from .compute import at_macs, cut_to_macs, macs
from .records import RECORD, read_plan
from .rows import ROWS, SCALES, TABLES


@contextmanager
def _naming(row: str) -> Iterator[None]:
    """Begin an error of a row's settings or network with the row's name."""
    try:
        yield
    except DataError:  # of the images, which all rows share
        raise
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{row}: {error}") from error


@dataclass(frozen=True)
class Experiment:
    """One table on one data set at one scale: `rkl experiments` runs it, and `rkl report` reads its record."""

    table: str
    data: str
    scale: str
    seeds: int
    out: Path
    overrides: dict[str, Any] = field(default_factory=dict)

    def folder(self, row: str, seed: int) -> Path:
        """The folder of one cell's run."""
        return self.out / "runs" / data_slug(self.data) / slug(row) / f"seed-{seed}"

    def config(self, row: str, seed: int) -> Config:
        """The configuration of one cell. The row's settings go over the caller's, and those over the scale's. If the
        row's compute is given, the width or the cuts fit it."""
        return replace(self._settled(row), seed=seed, out=self.folder(row, seed))

    def _settled(self, row: str) -> Config:
        base = self._fitted
        config = without_ignored(from_plain(ROWS[row].settings, base, source=row))
        like = ROWS[row].macs_of
        if like is None:
            return config
        reference = self._settled(like)
        fit = cut_to_macs if ROWS[row].keep_width else at_macs
        with _naming(row):
            return fit(config, ROWS[row].share * macs(reference, *self.shape), *self.shape)

    @property
    def _base(self) -> Config:
        return replace(from_plain(SCALES[self.scale].settings | self.overrides, source="experiment"), data=self.data)

    @property
    def _fitted(self) -> Config:
        """The settings of all rows. If the scale (not the caller) asks for more images than exist, all are used."""
        base = self._base
        if base.train_size:
            base = replace(base, train_size=max(base.train_size, IMAGES_OF_A_CLASS * self.shape[0]))
        asked = [name for name in SIZES if name not in self.overrides and getattr(base, name)]
        every: dict[str, Any] = {name: None for name in asked if getattr(base, name) > self.images[name]}
        return replace(base, **every)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of classes, channels, and height and width of the images."""
        return self._seen[0]

    @property
    def images(self) -> dict[str, int]:
        """The number of images to train on and to test on."""
        return self._seen[1]

    @cached_property
    def _seen(self) -> tuple[tuple[int, int, int], dict[str, int]]:
        # All images, at their own size. Without validation images, settings that need them must go too.
        whole: dict[str, Any] = dict.fromkeys((*SIZES, "image_size"))
        data = load_data(replace(self._base, **whole, val_fraction=0.0, patience=0, test_with="last"))
        size = self._base.image_size or data.image_size
        counts = dict(zip(SIZES, (len(data.train), len(data.test)), strict=True))
        return (data.num_classes, data.channels, size), counts

    @property
    def record(self) -> Path:
        return self.out / f"{self.table}-{data_slug(self.data)}.json"


SIZES = ("train_size", "test_size")
IMAGES_OF_A_CLASS = 4
"""At least this many images of a class are used, so that the smallest scale has one of each class to validate on."""


def slug(name: str) -> str:
    """A name turned into a folder name of lower case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def data_slug(name: str) -> str:
    """A data set's name turned into a folder name. A hash keeps names apart that have the same slug."""
    plain = slug(name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def experiment(
    table: str, scale: str, out: Path, data: str | None = None, seeds: int | None = None, **overrides: Any
) -> Experiment:
    """The experiment that a command asks for, with defaults for whatever the command left out.

    Raises:
        ValueError: an unknown table or scale, or fewer than one seed.
    """
    for name, value, known in (("table", table, TABLES), ("scale", scale, SCALES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    return Experiment(table, data or TABLES[table].data, scale, seeds or SCALES[scale].seeds, out, overrides)


def read_overrides(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, checked like a run's settings. The command's own options may not be in it."""
    read_yaml(path)
    settings = read_plain(path)
    for name in ("data", "out", "seed"):
        if name in settings:
            raise ValueError(f"{path}: keys must not be of the command's own options, got {name}; remove it")
    if "model" in settings:
        raise ValueError(f"{path}: keys must not be model, which each row has its own of; remove it")
    if settings.get("devices", 1) != 1:  # a run on several devices starts this command again
        raise ValueError(f"{path}: devices must be 1, as runs are trained side by side, got {settings['devices']}")
    return settings


def run(
    plan: Experiment,
    jobs: int | None = None,
    announce: Callable[[str], None] = print,
    only: Sequence[str] | None = None,
) -> Path:
    """Train every cell that is not finished, ``jobs`` at a time, and record the plan.

    Args:
        jobs: cells to train at once. By default there is one for each GPU or, without a GPU, one for each of torch's
            threads, since layers this small gain little from threads.
        announce: is called with one line at the start and one after each cell.
        only: the rows to train now; by default all of the table's. The record lists the whole table in any case, and
            the runs that an earlier command with more seeds left.

    Returns:
        The file of the plan's record; :func:`rkl.paper.tables.write` makes the page from it.

    Raises:
        RunError: a folder holds a run of other settings, ``plan.out`` holds a run itself or a foreign record, or some
            cells failed (the others are finished).
        ValueError: ``only`` is empty or names a row that the table does not have, or ``jobs`` is below 1.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    check_apart(plan.out, plan.data)
    _check_page(plan)
    rows = TABLES[plan.table].rows
    chosen = tuple(dict.fromkeys(rows if only is None else only))  # a row named twice is one row
    odd = [repr(row) for row in chosen if row not in rows]
    if odd or not chosen:
        raise ValueError(f"rows must be of {plan.table}'s: {', '.join(rows)}; got {odd[0] if odd else 'none'}")
    # Seed by seed, so that an interruption leaves whole pairs.
    wanted = [(row, seed) for seed in range(plan.seeds) for row in chosen]
    listed = _listed(plan)
    done = _finished(plan, listed)
    configs = {cell: plan.config(*cell) for cell in wanted if cell not in done}
    if configs:  # report bad data and settings once, before any run
        _check_new(configs, [plan.folder(*cell) for cell in done])
    settled = {"table": plan.table, "data": plan.data, "scale": plan.scale}
    write_text(plan.record, json.dumps(settled | {"rows": listed}, indent=1))
    announce(f"{TABLES[plan.table].title} on {plan.data}: {len(wanted)} runs, {len(wanted) - len(configs)} done before")
    errors = cells.train_all(configs, jobs, announce)
    if errors:
        raise RunError(f"{len(errors)} of {len(wanted)} runs failed, the first: {errors[0]}")
    return plan.record


def _check_page(plan: Experiment) -> None:
    """Check, before any run, that the page can be made of what lies beside the plan's record.

    Raises:
        RunError: the folder is a run's, which has another page, or a JSON file in it is no record of a table.
    """
    if (plan.out / "config.yaml").exists():
        raise RunError(
            f"{plan.out}: out must be a new folder or one of `rkl experiments`, got one with a run in it; "
            "give another folder"
        )
    for file in sorted({*plan.out.glob("*.json")} - {plan.record}):
        read_plan(file)


def _listed(plan: Experiment) -> dict[str, list[str]]:
    """The runs of each row, for the plan's number of seeds or the number in the present record, whichever is larger.
    Rows of the present record that the table no longer has stay at the end.

    Raises:
        RunError: the present record is damaged, or is of another scale and has a finished run.
    """
    with understood(plan.record, RECORD):
        none: dict[str, Any] = {"scale": plan.scale, "rows": {}}
        before = read_json(plan.record, RECORD) if plan.record.exists() else none
        runs = {row: list(map(str, of_row)) for row, of_row in before["rows"].items()}
        finished = any(_is_finished(plan.out / run) for of_row in runs.values() for run in of_row)
        if finished and before["scale"] != plan.scale:
            raise RunError(
                f"{plan.record}: scale must be that of the finished runs, {before['scale']!r}, got {plan.scale!r}; "
                "give another out"
            )
    seeds = {row: max(plan.seeds, len(runs.pop(row, []))) for row in TABLES[plan.table].rows}
    return {
        row: [str(plan.folder(row, seed).relative_to(plan.out)) for seed in range(n)] for row, n in seeds.items()
    } | runs


def _is_finished(folder: Path) -> bool:
    return (folder / "gradients.json").exists()


def _finished(plan: Experiment, listed: dict[str, list[str]]) -> list[Cell]:
    """The finished cells of the table. The page compares all of them, whichever rows the command trains.

    Raises:
        RunError: a cell's folder holds a run of other settings.
    """
    every = [(row, seed) for row in TABLES[plan.table].rows for seed in range(len(listed[row]))]
    finished = [cell for cell in every if _is_finished(plan.folder(*cell))]
    for cell in finished:
        folder, now = plan.folder(*cell), to_plain(plan.config(*cell))
        then = to_plain(read_yaml(folder / "config.yaml"))
        for key in now:
            if is_other_run(key, then.get(key), now[key]):
                raise RunError(
                    f"{folder}: holds a run with {key} {then.get(key)!r}, want {now[key]!r}; give another out"
                )
    return finished


def _check_new(configs: dict[Cell, Config], finished: list[Path]) -> None:
    """Check, before any run, what each would refuse at its start: its folder, and its row's settings and network, which
    is built once. The data must be there and be that of the finished runs, as far as their checkpoints tell."""
    begun = {cell for cell, config in configs.items() if RunLog(config, resume=True).has_checkpoint}
    rows = {cell[0]: cell for cell in configs}
    for row, cell in rows.items():
        with _naming(row):
            check_ignored(configs[cell])
    data = load_data(next(iter(configs.values())))
    for row, cell in rows.items():
        with _naming(row), torch.random.fork_rng(devices=[]):
            check_cutout(configs[cell], data)
            steps_an_epoch(configs[cell], len(data.train))
            check_cuts(configs[cell], new_model(configs[cell], data, restored=cell in begun), data)
    for folder in finished:
        file = folder / "checkpoints" / "last.json"
        if file.exists():
            with understood(file, "a checkpoint's JSON record"):
                check_data(folder, read_json(file, "a checkpoint's JSON record"), data)
