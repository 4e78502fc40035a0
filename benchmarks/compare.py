"""Hold one run against another and name what got slower: ``python -m benchmarks.compare NEW OLD``.

Absolute times of two runs mean little, so shares of the floor are compared (for models: ratios to PyTorch), each taken
within its run. A row has got slower when the change is more than the noise of both runs: three standard errors of the
two medians, or what rows measured twice differed by, whichever is more. Exit code 1 if any has.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from rkl_kernels.bench.machine import machine_line
from rkl_kernels.bench.row import OURS, Row
from rkl_kernels.bench.timing import Timing

from .models import ModelRow
from .suite import RESULTS, Run

ERRORS = 3.0
"""Standard errors that a change must exceed: of some 400 unchanged rows, about one passes."""


@dataclass(frozen=True)
class Change:
    """A row in one layout: ``slower`` times as long as before, where up to ``noise`` more would be noise."""

    id: str
    slower: float
    noise: float

    @property
    def counts(self) -> bool:
        return self.slower > 1 + self.noise


def _noise(run_noise: float, *timings: Timing) -> float:
    return max(ERRORS * math.hypot(*(timing.noise for timing in timings)), run_noise)


def _row_changes(new: Row, old: Row, run_noise: float) -> list[Change]:
    changes = []
    for name, timing in new.times.items():
        before, after = old.of_floor(name), new.of_floor(name)
        if name.startswith(OURS) and before and after:
            noise = _noise(run_noise, timing, old.times[name], new.copy, old.copy)
            changes.append(Change(f"{new.case.id}, {name}", before / after, noise))
    return changes


def _model_changes(new: ModelRow, old: ModelRow, run_noise: float) -> list[Change]:
    before, after = old.ratio(), new.ratio()
    if not before or not after:
        return []
    timings = [row.times[name] for row in (new, old) for name in (row.best(OURS), row.best("eager")) if name]
    return [Change(f"{new.model} {new.direction}", before / after, _noise(run_noise, *timings))]


def compare(new: Run, old: Run) -> list[Change]:
    """Every row that both runs have, the most slowed first."""
    run_noise = max(new.noise, old.noise)
    rows = {row.case.id: row for row in old.rows}
    models = {(row.model, row.direction): row for row in old.models}
    changes = [c for row in new.rows if row.case.id in rows for c in _row_changes(row, rows[row.case.id], run_noise)]
    for model in new.models:
        if (model.model, model.direction) in models:
            changes += _model_changes(model, models[model.model, model.direction], run_noise)
    return sorted(changes, key=lambda change: -change.slower)


def missing(new: Run, old: Run) -> list[str]:
    """Rows of ours that the old run timed and the new one did not: a contestant that now fails is worse than slow."""
    timed = {(row.case.id, name) for row in new.rows for name in row.times}
    measured = {row.case.id for row in new.rows}
    return [
        f"{row.case.id}, {name}"
        for row in old.rows
        for name in row.times
        if row.case.id in measured and name.startswith(OURS) and (row.case.id, name) not in timed
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("new", type=Path, help="JSON of the run to judge")
    parser.add_argument("old", type=Path, nargs="?", help="JSON to hold it against; the committed one of that name")
    options = parser.parse_args(arguments)
    old_path = options.old or RESULTS / options.new.name
    for path in (options.new, old_path):
        if not path.is_file():
            parser.error(f"no run at {path}; `make bench` writes one")
    new, old = Run.load(options.new), Run.load(old_path)
    if new.machine["device"] != old.machine["device"] or new.machine["threads"] != old.machine["threads"]:
        print(f"other machines: {machine_line(new.machine)} | {machine_line(old.machine)}")
    changes, lost = compare(new, old), missing(new, old)
    slowed = [change for change in changes if change.counts]
    for change in slowed:
        print(f"slower: {change.id}: {change.slower:.2f}x the time, noise up to {1 + change.noise:.2f}x")
    for name in lost:
        print(f"lost: {name}: was timed, now fails or is wrong")
    faster = sum(1 / change.slower > 1 + change.noise for change in changes)
    print(f"{len(changes)} rows compared: {len(slowed)} slower, {faster} faster, {len(lost)} lost")
    return int(bool(slowed or lost))


if __name__ == "__main__":
    sys.exit(main())
