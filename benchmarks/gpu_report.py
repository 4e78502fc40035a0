"""A run of ``make gpu`` as Markdown: each group's bars beside the measured figures, models, host, counters, every row.

``python -m benchmarks.gpu_report FILE.json`` writes it again from a record.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rkl.training.files import write_text
from rkl_kernels.bench.machine import machine_line
from rkl_kernels.bench.row import Row
from rkl_kernels.bench.table import COLUMNS, cells, geometric_mean
from rkl_kernels.bench.timing import to_json

from . import gpu_models, report
from .arguments import write_again
from .gpu_groups import GROUPS, Group, over_best
from .gpu_host import PASSES, HostRow
from .models import ModelRow
from .report import markdown_table as table
from .suite import Run


@dataclass
class GpuRun(Run):
    """Everything that one run measured on a GPU.

    Attributes:
        failed: rows, models and other steps that gave no figure at all, and why. Earlier records do not tell.
    """

    tests: str = ""
    host: list[dict[str, Any]] = field(default_factory=list)
    counters: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def add_host(self, rows: Sequence[HostRow]) -> None:
        self.host = [
            vars(row) | {"times": {name: to_json(one) for name, one in row.times.items()}, "ratio": row.ratio}
            for row in rows
        ]


def write(run: GpuRun, path: Path) -> None:
    """Write the table (.md) and the plot (.png) beside the record at ``path``."""
    plot = path.with_suffix(".png")
    if run.rows:
        report.plot(run, plot)
    write_text(path.with_suffix(".md"), markdown(run, plot.name if run.rows else None))


def bar_lines(group: Group, rows: Sequence[Row]) -> list[list[str]]:
    """A line for each bar: its name, the bar, the measured figure, and whether the figure meets the bar."""
    lines = []
    for bar in group.bars:
        found = bar.figure(rows)
        sign = "<=" if bar.at_most else ">="
        met = "-" if found is None else "yes" if bar.met(found) else "**no**"
        lines.append([bar.what, f"{sign} {bar.bar:{bar.form}}", "-" if found is None else f"{found:{bar.form}}", met])
    return lines


SUMMARY = ("group", "direction", "rows", "of floor", "x the best rival", "lowest", "below 1")


def summary_lines(group: Group, rows: Sequence[Row]) -> list[list[str]]:
    """A line for each direction, in NHWC: geometric means of the share of the floor and of the ratio to the best rival
    in any layout, the lowest ratio, and how many ratios are below 1."""
    lines = []
    for direction in dict.fromkeys(row.case.direction for row in rows):
        of_it = [row for row in rows if row.case.direction == direction]
        share = geometric_mean(row.of_floor("ours nhwc") for row in of_it)
        times = [x for row in of_it if (x := over_best(row)) is not None]
        mean, lowest, below = geometric_mean(times), min(times, default=None), sum(x < 1 for x in times)
        figures = [report.times(share, ".0%"), report.times(mean), report.times(lowest), str(below)]
        lines.append([group.name, direction, report.counted(of_it, ratio=over_best), *figures])
    return lines


def model_lines(rows: Sequence[ModelRow]) -> list[list[str]]:
    lines = []
    for row in rows:
        bar = gpu_models.bar_of(row)
        lines.append(
            [
                row.model, row.direction, f"{row.batch} x {row.size}²",
                *(f"{row.times[v].seconds * 1e3:.1f}" if v in row.times else "-" for v in _VARIANTS),
                _with_bar(gpu_models.ratio(row, "eager"), bar.faster), report.times(gpu_models.ratio(row, "compile")),
                *(f"{row.memory[v] / 1e6:.0f}" if v in row.memory else "-" for v in _VARIANTS),
                _with_bar(gpu_models.memory_ratio(row, "eager"), bar.memory, at_most=True),
            ]
        )  # fmt: skip
    return lines


_VARIANTS = (*gpu_models.VARIANTS, gpu_models.COMPILE)
_MODEL_COLUMNS = (
    "model", "direction", "batch", *(f"{v} ms" for v in _VARIANTS), "x eager (bar)", "x compile",
    *(f"{v} peak MB" for v in _VARIANTS), "peak / eager's (bar)",
)  # fmt: skip


def _with_bar(value: float | None, bar: float | None, at_most: bool = False) -> str:
    if value is None or bar is None:
        return report.times(value)
    met = value <= bar if at_most else value >= bar
    return f"{value:.2f} ({'<=' if at_most else '>='} {bar}{'' if met else ', **no**'})"


def host_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            row["operator"], row["step"], *(f"{row['times'][name]['seconds'] * 1e6:.1f}" for name in ("ours", "eager")),
            _with_bar(row["ratio"], PASSES[row["step"]], at_most=True),
        ]
        for row in rows
    ]  # fmt: skip


def markdown(run: GpuRun, plot_name: str | None) -> str:
    copies = ", ".join(f"{size // 1_000_000} MB: {rate / 1e9:.0f}" for size, rate in run.copy_rates.items())
    rates = ", ".join(f"{dtype}: {rate / 1e9:.0f}" for dtype, rate in run.matrix_rates.items())
    groups = [(group, [row for row in run.rows if group.has(row.case)]) for group in GROUPS]
    measured = [(group, rows) for group, rows in groups if rows]
    parts = [
        f"# {machine_line(run.machine)}",
        f"Tests: {run.tests or 'not run'}. Copy, GB/s by bytes moved: {copies}. Matrix product, GFLOP/s: {rates}. "
        f"The run took {run.seconds:.0f} s.",
        "`x`: how many times faster than PyTorch eager in the same layout, or than the best rival in any; `of floor`: "
        "the share of the speed that the unavoidable bytes at copy bandwidth, or the operations at the matrix rate, "
        "allow. fp32 rows: TF32 off for every contestant; tf32 rows: on for every one.",
    ]
    if measured:
        lines = [[group.name, str(len(rows)), *line] for group, rows in measured for line in bar_lines(group, rows)]
        parts += ["## Bars", table(("group", "rows", "figure", "bar", "found", "met"), lines)]
        lines = [line for group, rows in measured for line in summary_lines(group, rows)]
        parts += ["## Groups, NHWC, geometric means", table(SUMMARY, lines)]
    if run.models:
        parts += [
            "## Models, bf16, channels_last",
            "Launched by the host. `compile`: torch.compile in its default mode; rows of operators have it in "
            "max-autotune-no-cudagraphs. Times that are not there were not reached, or stand below as not timed.",
            table(_MODEL_COLUMNS, model_lines(run.models)),
        ]
    if run.host:
        header = ("operator", "pass", "ours us", "PyTorch us", "x PyTorch's (bar)")
        parts += ["## The host's time for a call, tiny tensors", table(header, host_lines(run.host))]
    if run.counters:
        lines = [[str(value) for value in row.values()] for row in run.counters]
        parts += ["## Counters", table(tuple(run.counters[0]), lines)]
    if plot_name:
        parts.append(f"![Roofline]({plot_name})")
    for group, rows in measured:
        parts += [f"## {group.name}: {group.title}", table(("figure", "bar", "found", "met"), bar_lines(group, rows))]
        parts.append(table(COLUMNS, [cells(row) for row in rows]))
    return "\n\n".join([*parts, *_left_out(run)]) + "\n"


def _left_out(run: GpuRun) -> list[str]:
    rejected = [[row.case.id, name, why] for row in run.rows for name, why in row.rejected.items()]
    rejected += [
        [f"{row.model} {row.direction}", name, why] for row in run.models for name, why in row.rejected.items()
    ]
    rejected += [[title, "all", why] for title, why in run.failed.items()]
    parts = ["## Not reached in time", ", ".join(run.left_out)] if run.left_out else []
    return parts + (["## Not timed", table(("row", "contestant", "why"), rejected)] if rejected else [])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    return write_again(parser, arguments, "make gpu", GpuRun.load, write)


if __name__ == "__main__":
    sys.exit(main())
