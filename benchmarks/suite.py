"""The whole suite, ``make bench``: every shape and the models, written as JSON, a table and a plot.

The contestants of a row are timed in rounds (``rkl_kernels.bench.timing.interleave``). pytest-benchmark times one
contestant to its end before the next begins, so on a shared machine the drift between the two would go into their
ratio. bench_operators.py uses it for single cases, with the same contestants.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from rkl.training.files import check_writable, write_text
from rkl_kernels.allocator import keep_freed_memory
from rkl_kernels.bench import Case, contestants, runtimes
from rkl_kernels.bench.machine import held_to, machine, machine_line, other_machine, slug
from rkl_kernels.bench.rivals import TYPES
from rkl_kernels.bench.row import Row, from_json, measure, to_json
from rkl_kernels.bench.timing import copier, cpu_timer, interleave, multiplier
from rkl_kernels.errors import told

from . import models, report
from .arguments import count, positive, writing
from .shapes import SHAPES

RESULTS = Path(__file__).parent / "results"
COPY_SIZES = tuple(2**n * 1_000_000 for n in range(8))
"""Bytes moved by the copies that are measured first: 1 to 128 MB. Some fit into a cache, some do not."""
MOST_BUDGET = 1.5
"""The most seconds of timing a row."""
AGAIN = 8
"""Rows that are measured a second time at the end. The difference between the two is the run's own noise."""


AnyRun = TypeVar("AnyRun", bound="Run")


@dataclass
class Run:
    """Everything that one run measured."""

    machine: dict[str, Any]
    copy_rates: dict[int, float] = field(default_factory=dict)
    matrix_rates: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    models: list[models.ModelRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    noise: float | None = None
    seconds: float = 0.0
    again: list[str] = field(default_factory=list)
    """Parts of names: rows whose names contain one are from later runs, and replace this run's rows."""
    only: str = ""
    """The part that all rows' names contain, where not all rows were wanted."""
    no_models: bool = False
    """Whether only operators were wanted (``--no-models``). Earlier records do not tell."""

    def with_rows_of(self: AnyRun, later: Run, only: str) -> AnyRun:
        """This run, with its own rows replaced by those of a later run, whose names contain ``only``."""
        measured = {row.case.id: row for row in later.rows}
        rows = [measured.pop(row.case.id, row) for row in self.rows]
        left_out = [name for name in self.left_out if name not in measured]
        again = [*self.again, *([only] if only not in self.again else [])]
        noise = most_noise(self, later)
        return replace(self, rows=rows + list(measured.values()), left_out=left_out, again=again, noise=noise)

    def save(self, path: Path) -> None:
        data = vars(self) | {
            "copy_rates": {str(size): rate for size, rate in self.copy_rates.items()},
            "rows": [to_json(row) for row in self.rows],
            "models": [models.to_json(row) for row in self.models],
        }
        write_text(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls: type[AnyRun], path: Path) -> AnyRun:
        """The run that :meth:`save` wrote.

        Raises:
            ValueError: the file holds no run.
        """
        try:
            data = json.loads(path.read_text())
            run = cls(
                **data
                | {
                    "copy_rates": {int(size): rate for size, rate in data["copy_rates"].items()},
                    "rows": [from_json(row) for row in data["rows"]],
                    "models": [models.from_json(row) for row in data["models"]],
                }
            )
            machine_line(run.machine)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
            raise ValueError(f"must be the record of a run, got {path}: {told(problem)}") from problem
        return run


def cases() -> Iterator[Case]:
    """The suite's rows, shape by shape, so that one reference serves both types of a direction."""
    for shape in SHAPES:
        operators = ["depthwise"] + ["separable"] * (shape.out_channels is not None)
        if shape.id in ("mnv1-112", "mnv2-56", "xcep-147", "rkl-32-k3"):
            operators.append("trelu")
        for operator in operators:
            for direction in ("forward", "backward"):
                for dtype in ("fp32", "bf16"):
                    yield shape.case(operator, direction, dtype)


def rivals_of(case: Case) -> list[str]:
    """Eager always, the runtimes where they serve the case, and the compiler for T-ReLU, where it has steps to fuse."""
    rivals = ["eager"]
    if case.operator == "trelu":
        rivals.append("compile")
    if runtimes.serves(case):
        rivals += [name for name in runtimes.NAMES if runtimes.installed(name)]
    return rivals


def measure_machine(run: Run, budget: float) -> None:
    """Measure the copy bandwidth at each size and the matrix rate of each type, before anything else."""
    copies = interleave({str(size): copier(size, "cpu") for size in COPY_SIZES}, cpu_timer, budget)
    run.copy_rates = {size: size / copies[str(size)].seconds for size in COPY_SIZES}
    products = {dtype: multiplier(TYPES[dtype], "cpu") for dtype in ("fp32", "bf16")}
    timings = interleave({dtype: product for dtype, (product, _) in products.items()}, cpu_timer, budget)
    run.matrix_rates = {dtype: products[dtype][1] / timing.seconds for dtype, timing in timings.items()}


def noise_between(pairs: list[tuple[Row, Row]]) -> float | None:
    """The largest change, as a share, of a row's share of the floor between its two measurements. None where no row was
    measured twice."""
    shares = [(one.of_floor(), other.of_floor()) for one, other in pairs]
    return max((abs(a / b - 1) for a, b in shares if a and b), default=None)


def most_noise(*runs: Run) -> float | None:
    """The largest noise of the runs. None where no run has one."""
    return max((run.noise for run in runs if run.noise is not None), default=None)


def perform(chosen: list[Case], with_models: bool, within: float) -> Run:
    """Measure the machine, the models and the chosen rows, in about ``within`` seconds.

    Half of the time left goes to timing, spread evenly over the rows left, the other half to making and checking the
    contestants. Rows for which a slow machine has no time are named.
    """
    start = time.perf_counter()
    run = Run(machine())
    keep_freed_memory()
    measure_machine(run, within / 300)
    if with_models:
        run.models = models.measure_all(budget=within / 180, within=within / 4)

    def timed(case: Case, left: int, until: float) -> Row | None:
        remaining = until - (time.perf_counter() - start)
        budget = min(MOST_BUDGET, remaining / left / 2)
        if remaining < 0:
            return None
        row = measure(case, contestants(rivals_of(case)), budget=budget, faulting=True)
        share, times = row.of_floor() or 0.0, row.over_best() or 0.0
        elapsed = time.perf_counter() - start
        print(f"{elapsed:5.0f} s  {case.id:<40} {times:5.2f}x the best rival, {share:4.0%} of the floor", flush=True)
        return row

    for i, case in enumerate(chosen):
        if row := timed(case, len(chosen) - i, 0.95 * within):
            run.rows.append(row)
        else:
            run.left_out.append(case.id)
    first = run.rows[:: max(1, len(run.rows) // AGAIN)][:AGAIN]
    pairs = [(row, again) for row in first if (again := timed(row.case, AGAIN, within))]
    run.noise = noise_between(pairs)
    run.seconds = time.perf_counter() - start
    return run


def record(folder: Path, only: str, again: bool) -> Path:
    """Where a run is written. A partial run has its own file name, unless it goes into the record of all rows."""
    part = "" if again or not only else "." + re.sub(r"[^a-z0-9]+", "-", only.lower()).strip("-")
    return folder / f"{slug(machine())}{part}.json"


def written(path: Path) -> list[Path]:
    """The files that are written for the record at ``path``: itself, its table and its plot."""
    return [path.with_suffix(ending) for ending in (".json", ".md", ".png")]


def place(path: Path, run: Run) -> Path:
    """Where a run is written: at ``path`` or, if the record there has rows that this run's time did not reach, beside
    that (``.part.json``)."""
    try:
        before = Run.load(path)
    except ValueError:  # no record there, or none that can be read
        return path
    lost = {row.case.id for row in before.rows} - {row.case.id for row in run.rows}
    return path.with_name(f"{path.stem}.part.json") if lost & set(run.left_out) else path


def _check_without_models(parser: argparse.ArgumentParser, path: Path) -> None:
    """End the program where a run without models would replace one with models."""
    try:
        has_models = bool(Run.load(path).models)
    except ValueError as problem:
        parser.error(f"--out {problem}; give another --out")
    if has_models:
        parser.error(f"--no-models must not replace a record with models, got {path}; give another --out")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--only", default="", help="only rows whose id contains this, in a separate record")
    parser.add_argument("--within", type=positive, default=540, help="seconds for everything")
    parser.add_argument("--threads", type=count, help="threads of every contestant, instead of one for each core")
    parser.add_argument("--no-models", action="store_true", help="operators only; never replaces a record with models")
    parser.add_argument(
        "--again", action="store_true", help="measure the rows of --only again, without models, for the existing record"
    )
    options = parser.parse_args(arguments)
    chosen = [case for case in cases() if options.only in case.id]
    if not chosen:
        parser.error(
            f"--only must be part of a row's id, such as 'depthwise forward fp32 mnv1-112', got {options.only!r}"
        )
    if held_to() and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        parser.error("ONEDNN_MAX_CPU_ISA must be set beside ATEN_CPU_CAPABILITY, got none; oneDNN reads it alone: AVX2")
    if options.threads:
        torch.set_num_threads(options.threads)
    path = record(options.out, options.only, options.again)
    if options.again and not (options.only and path.exists()):
        parser.error(f"--again must have --only and a record to go into, got --only {options.only!r} for {path}")
    try:
        before = Run.load(path) if options.again else None
    except ValueError as problem:
        parser.error(f"--again {problem}; `make bench` writes one")
    if before and (other := other_machine(before.machine, machine())):
        parser.error(
            f"--again must be for a record of this machine and its versions, got {path} of {other}, and here it is "
            f"{machine_line(machine())}; leave --again out"
        )
    if options.no_models and not options.again and path.exists():
        _check_without_models(parser, path)
    with writing(parser):
        check_writable(*written(path))
    run = perform(chosen, not (options.no_models or options.again), options.within)
    if before:
        run = before.with_rows_of(run, options.only)
    else:
        run = replace(run, only=options.only, no_models=options.no_models)
        path = place(path, run)
    with writing(parser):
        run.save(path)
        report.write(run, path)
    print(machine_line(run.machine), f"{run.seconds:.0f} s. {report.measured_twice(run)}", sep="\n")
    print(f"written: {', '.join(map(str, written(path)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
