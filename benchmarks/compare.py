"""Compare a run with another and name what got slower: ``python -m benchmarks.compare NEW OLD``.

Absolute times of two runs say little. So shares of the floor are compared (for models, ratios to PyTorch), each taken
within its own run. A row is slower when its change is larger than the noise of both runs: three standard errors of the
medians, or the difference of rows measured twice, whichever is larger. The exit code is 1 if a row is slower, if one
that was timed now fails or is missing, or if there is nothing to compare. Rivals that only one run could
time are named.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from rkl_kernels.bench.machine import machine_line
from rkl_kernels.bench.row import OURS, Row

from .models import DIRECTIONS, ModelRow
from .suite import RESULTS, Run, most_noise

ERRORS = 3.0
"""Standard errors that a change must exceed. About one of 700 unchanged rows does."""


@dataclass(frozen=True)
class Change:
    """A row in one layout. It takes ``slower`` times as long as before. Up to 1 + ``noise`` times would be noise."""

    id: str
    slower: float
    noise: float

    @property
    def counts(self) -> bool:
        return self.slower > 1 + self.noise


def _noise(run_noise: float, *noises: float) -> float:
    return max(ERRORS * math.hypot(*noises), run_noise)


def _row_changes(new: Row, old: Row, run_noise: float) -> list[Change]:
    changes = []
    for name, timing in new.times.items():
        before, after = old.of_floor(name), new.of_floor(name)
        if name.startswith(OURS) and before and after:
            noise = _noise(run_noise, timing.noise, old.times[name].noise, new.floor_noise, old.floor_noise)
            changes.append(Change(f"{new.case.id}, {name}", before / after, noise))
    return changes


def _model_changes(new: ModelRow, old: ModelRow, run_noise: float) -> list[Change]:
    before, after = old.ratio(), new.ratio()
    if not before or not after:
        return []
    noises = [row.times[name].noise for row in (new, old) for name in (row.best(OURS), row.best("eager")) if name]
    return [Change(f"{new.model} {new.direction}", before / after, _noise(run_noise, *noises))]


def compare(new: Run, old: Run) -> list[Change]:
    """A change for every row that both runs have, the slowest first."""
    run_noise = most_noise(new, old) or 0.0
    rows = {row.case.id: row for row in old.rows}
    models = {(row.model, row.direction): row for row in old.models}
    changes = [c for row in new.rows if row.case.id in rows for c in _row_changes(row, rows[row.case.id], run_noise)]
    for model in new.models:
        if (model.model, model.direction) in models:
            changes += _model_changes(model, models[model.model, model.direction], run_noise)
    return sorted(changes, key=lambda change: -change.slower)


def part_of(old: Run, new: Run) -> Run:
    """What of the old run the new one was to measure: the rows of its ``--only``, or all rows, and the models, unless
    these were not wanted. An earlier record does not tell that, and a part without models did not want them."""
    rows = [row for row in old.rows if new.only in row.case.id]
    without = new.no_models or (new.only and not new.models)
    return replace(old, rows=rows, models=[] if without else old.models)


def _timed(run: Run, ours: bool = True) -> list[tuple[str, str]]:
    """Every row and model, paired with each contestant of ours that was timed, or with each rival."""
    rows = [(row.case.id, row.times) for row in run.rows]
    models = [(f"{row.model} {row.direction}", row.times) for row in run.models]
    return [(id, name) for id, times in (*rows, *models) for name in times if name.startswith(OURS) == ours]


def missing(new: Run, old: Run) -> dict[str, str]:
    """Contestants of ours that the old run timed and the new one rejected, with the reasons. Failing is worse than
    being slow."""
    timed, known, why = set(_timed(new)), _measured(new), _rejected(new)
    lost = [(id, name) for id, name in _timed(old) if id in known and (id, name) not in timed]
    return {f"{id}, {name}": why.get((id, name)) or why.get((id, "all"), "fails or is wrong") for id, name in lost}


def rivals_rejected(one: Run, other: Run) -> dict[str, str]:
    """Rivals that the other run timed and this one rejected, with the reasons. A row's ratios are then to other rivals
    than before."""
    why = _rejected(one)
    return {f"{id}, {name}": why[id, name] for id, name in _timed(other, ours=False) if (id, name) in why}


def unreached(new: Run, old: Run) -> list[str]:
    """Rows and models for which the old run timed ours, and which the new run does not have."""
    known = _measured(new)
    return [id for id in dict.fromkeys(id for id, _ in _timed(old)) if id not in known]


def _measured(run: Run) -> set[str]:
    """The names of all rows and models that were tried."""
    models = {f"{row.model} {row.direction}" for row in run.models}
    return {row.case.id for row in run.rows} | models | {id for id, _ in _rejected(run)}


def _rejected(run: Run) -> dict[tuple[str, str], str]:
    """Why contestants were not timed. A model's "all" is in one row, and counts for both directions."""
    why = {(row.case.id, name): text for row in run.rows for name, text in row.rejected.items()}
    for row in run.models:
        for name, text in row.rejected.items():
            why |= {(f"{row.model} {d}", name): text for d in (DIRECTIONS if name == "all" else [row.direction])}
    return why


def read(parser: argparse.ArgumentParser, name: str, path: Path) -> Run:
    """The run that an argument names. If there is none, the program ends."""
    if not path.is_file():
        parser.error(f"{name} must be a file, got no run at {path}; `make bench` writes one")
    try:
        return Run.load(path)
    except ValueError as problem:
        parser.error(f"{name} {problem}; `make bench` writes one")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("new", type=Path, help="JSON of the new run")
    parser.add_argument(
        "old", type=Path, nargs="?", help="JSON of the run before; default: the committed one of that name"
    )
    options = parser.parse_args(arguments)
    whole = options.new.name.partition(".")[0] + ".json"  # a partial record has the part's name after the machine's
    new = read(parser, "NEW", options.new)
    old = part_of(read(parser, "OLD", options.old or RESULTS / whole), new)
    if new.machine["device"] != old.machine["device"] or new.machine["threads"] != old.machine["threads"]:
        print(f"other machines: {machine_line(new.machine)} | {machine_line(old.machine)}")
    return report(new, old)


def report(new: Run, old: Run) -> int:
    """Print everything that got worse, and return the exit code."""
    changes, lost, left = compare(new, old), missing(new, old), unreached(new, old)
    slowed = [change for change in changes if change.counts]
    for change in slowed:
        print(f"slower: {change.id}: {change.slower:.2f}x the time, noise up to {1 + change.noise:.2f}x")
    for name, why in lost.items():
        print(f"lost: {name}: was timed, now {why}")
    for name, why in rivals_rejected(new, old).items():
        print(f"rival fails: {name}: was timed, now {why}")
    for name, why in rivals_rejected(old, new).items():
        print(f"rival is back: {name}: is timed, was {why}")
    for name in left:
        print(f"not reached: {name}: was timed, the new run has no such row")
    unjudged = sum(math.isinf(change.noise) for change in changes)
    if unjudged:
        print(f"not judged: {unjudged} rows, of which a run has a single sample and so no noise")
    if not changes:
        print("nothing compared: the runs have no row of ours in common")
    faster = sum(1 / change.slower > 1 + change.noise for change in changes)
    print(f"{len(changes)} rows compared: {len(slowed)} slower, {faster} faster, {len(lost)} lost")
    return int(bool(slowed or lost or left or not changes))


if __name__ == "__main__":
    sys.exit(main())
