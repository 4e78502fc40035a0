"""A run as a Markdown table and a roofline plot.

``python -m benchmarks.report FILE.json`` writes both again from a record of ``make bench``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rkl.training.files import save_figure, write_text
from rkl_kernels.bench.case import DIRECTIONS
from rkl_kernels.bench.machine import machine_line
from rkl_kernels.bench.row import OURS, Row
from rkl_kernels.bench.table import COLUMNS, cells, geometric_mean

from .arguments import write_again

if TYPE_CHECKING:
    from .models import ModelRow
    from .suite import Run

DTYPES = ("fp32", "bf16")
MARKERS = {"trelu": "^", "depthwise": "o", "separable": "s"}


def write(run: Run, path: Path) -> None:
    """Write the table (.md) and the plot (.png) beside the record at ``path``."""
    write_text(path.with_suffix(".md"), markdown(run, path.with_suffix(".png").name))
    plot(run, path.with_suffix(".png"))


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def times(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def counted(*groups: Sequence[Row], ratio: Callable[[Row], float | None] = Row.over_best) -> str:
    """The number of rows of the largest group, and of all groups' rows without a ratio: ours or every rival failed
    there, and no mean says so."""
    without = sum(ratio(row) is None for rows in groups for row in rows)
    return f"{max(map(len, groups))}{f' ({without} without a ratio)' if without else ''}"


def summary_lines(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each operator, direction and type in the rows: geometric means, and the lowest row."""
    lines = []
    for operator in MARKERS:
        for direction in DIRECTIONS:
            for dtype in DTYPES:
                group = [
                    r
                    for r in rows
                    if (r.case.operator, r.case.direction, r.case.precision) == (operator, direction, dtype)
                ]
                if not group:
                    continue
                over = [(ratio, r.case.name) for r in group if (ratio := r.over_best())]
                lowest = "{:.2f} ({})".format(*min(over)) if over else "-"
                lines.append(
                    [
                        f"{operator} {direction} {dtype}",
                        counted(group),
                        times(geometric_mean(r.same_layout("nchw") for r in group)),
                        times(geometric_mean(r.same_layout("nhwc") for r in group)),
                        times(geometric_mean(r.over_best() for r in group)),
                        lowest,
                        f"{sum(ratio < 1 for ratio, _ in over)}",
                        times(geometric_mean(r.of_floor(f"{OURS} nchw") for r in group), ".0%"),
                        times(geometric_mean(r.of_floor(f"{OURS} nhwc") for r in group), ".0%"),
                        times(geometric_mean(r.same_layout_faulting("nhwc") for r in group)),
                    ]
                )
    return lines


SUMMARY = (
    *("group", "rows", "x nchw", "x nhwc", "x best rival", "lowest", "below 1x", "of floor nchw", "of floor nhwc"),
    "x nhwc, faulting",
)


def model_lines(rows: Sequence[ModelRow]) -> list[list[str]]:
    variants = ("ours nchw", "ours nhwc", "eager nchw", "eager nhwc")
    return [
        [
            row.model,
            row.direction,
            f"{row.batch} x {row.size}²",
            *[f"{row.times[v].seconds * 1e3:.0f}" if v in row.times else "-" for v in variants],
            times(row.ratio()),
            *[f"{row.memory[v] / 1e6:.0f}" if v in row.memory else "" for v in ("ours nhwc", "eager nhwc")],
            "" if row.memory_ratio() is None else f"{row.memory_ratio():.2f}",
        ]
        for row in rows
    ]


MODEL_COLUMNS = (
    *("model", "direction", "batch x size", "ours nchw ms", "ours nhwc ms", "eager nchw ms", "eager nhwc ms", "x"),
    *("ours peak MB (nhwc)", "eager peak MB (nhwc)", "peak ratio (faster layouts)"),
)


def measured_twice(run: Run) -> str:
    """The run's own noise, as a sentence."""
    return (
        "No row was measured twice." if run.noise is None else f"Rows measured twice differ by up to {run.noise:.0%}."
    )


def markdown(run: Run, plot_name: str) -> str:
    """The whole run as text and tables."""
    copies = ", ".join(f"{size // 1_000_000} MB: {rate / 1e9:.0f}" for size, rate in run.copy_rates.items())
    rates = ", ".join(f"{dtype}: {rate / 1e9:.0f}" for dtype, rate in run.matrix_rates.items())
    rejected = [(row.case.id, name, why) for row in run.rows for name, why in row.rejected.items()]
    rejected += [
        (f"{row.model} {row.direction}", name, why) for row in run.models for name, why in row.rejected.items()
    ]
    names = " and ".join(f"`{name}`" for name in run.again)
    later = f" Rows with {names} in their name are of later runs (`--again --only ...`)." if names else ""
    parts = [
        f"# {machine_line(run.machine)}",
        f"Copy, GB/s by bytes moved: {copies}. Matrix product, GFLOP/s: {rates}. {measured_twice(run)} "
        f"The run took {run.seconds:.0f} s.{later}",
        "Ratios are how many times faster this package is: than PyTorch eager in the same layout (`x nchw`, `x nhwc`), "
        "and, in its better layout, than the best rival in any (`x best`). `of floor`: the share of the speed that the "
        "unavoidable bytes at copy bandwidth, or the operations at the matrix rate, allow. (A copy on a CPU reads "
        "each line of its output before it writes it. What is written past the caches need not, and may exceed it.) "
        "Times are of layers in a row, each reading the one before, or, where the shape does not allow that, of a call "
        "and an in-place ReLU over its result. glibc's allocator keeps freed memory here, so none pays for page "
        "faults; `faulting`: channels_last over PyTorch's with the allocator as it comes.",
        "## Summary (geometric means)",
        markdown_table(SUMMARY, summary_lines(run.rows)),
    ]
    if run.models:
        parts += ["## Models, fp32", markdown_table(MODEL_COLUMNS, model_lines(run.models))]
        parts += [f"{row.model}, {row.direction}: {row.note}." for row in run.models if row.note]
    parts += [f"![Roofline]({plot_name})", "## Every row, in milliseconds"]
    parts.append(markdown_table(COLUMNS, [cells(row) for row in run.rows]))
    if run.left_out:
        parts += ["## Not reached in time", ", ".join(run.left_out)]
    if rejected:
        parts += ["## Not timed", markdown_table(("row", "contestant", "why"), rejected)]
    return "\n\n".join(parts) + "\n"


def plot(run: Run, path: Path) -> None:
    """Plot operations a second over operations a byte: the best rival's point, ours, and the machine's two roofs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directions = [d for d in DIRECTIONS if any(row.case.direction == d for row in run.rows)] or ["forward"]
    dtypes = [d for d in DTYPES if any(row.case.precision == d for row in run.rows)] or ["fp32"]
    size = {"figsize": (6.5 * len(directions), 5 * len(dtypes)), "sharex": True, "sharey": True}
    figure, axes = plt.subplots(len(dtypes), len(directions), squeeze=False, layout="constrained", **size)
    for line, dtype in zip(axes, dtypes, strict=True):
        for axis, direction in zip(line, directions, strict=True):
            _roofs(axis, run, dtype)
            for row in run.rows:
                if (row.case.precision, row.case.direction) == (dtype, direction):
                    _pair(axis, row)
            axis.set_title(f"{direction}, {dtype}")
            axis.grid(True, which="major", alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("operations for each byte that must move")
    for axis in axes[:, 0]:
        axis.set_ylabel("Gop/s")
    _legend(figure, axes[0, 0], run)
    figure.suptitle(machine_line(run.machine))
    try:
        save_figure(figure, path, dpi=110)
    finally:
        plt.close(figure)


def _roofs(axis, run: Run, dtype: str) -> None:  # type: ignore[no-untyped-def]
    """Draw the matrix rate, and below it the copy bandwidth of the largest and of the fastest size. Nothing is drawn
    where they were not measured."""
    axis.loglog()
    if not run.copy_rates:
        return
    peak, low, high = run.matrix_rates[dtype], 0.06, 1000.0
    for rate, style in ((run.copy_rates[max(run.copy_rates)], "-"), (max(run.copy_rates.values()), ":")):
        heights = [low * rate / 1e9, peak / 1e9, peak / 1e9]
        axis.loglog([low, peak / rate, high], heights, style, color="0.35", linewidth=1.3)
    axis.text(high, peak / 1e9 * 1.1, "matrix product", ha="right", fontsize=8, color="0.3")


def _pair(axis, row: Row) -> None:  # type: ignore[no-untyped-def]
    mine, rival = row.best(mine=True), row.best(mine=False)
    operations = row.case.least_operations
    intensity = operations / row.case.bytes
    heights = {name: operations / row.times[name].seconds / 1e9 for name in (mine, rival) if name is not None}
    if mine in heights and rival in heights:
        axis.plot([intensity] * 2, [heights[rival], heights[mine]], color="0.75", linewidth=0.8, zorder=1)
    for name, color, zorder in ((rival, "tab:orange", 2), (mine, "tab:blue", 3)):
        if name in heights:
            marker = MARKERS[row.case.operator]
            axis.plot(intensity, heights[name], marker, color=color, markersize=5.5, alpha=0.85, zorder=zorder)


def _legend(figure, axis, run: Run) -> None:  # type: ignore[no-untyped-def]
    handles = [axis.plot([], [], marker, color="0.4", label=operator)[0] for operator, marker in MARKERS.items()]
    for color, label in (("tab:blue", "this package, better layout"), ("tab:orange", "best rival, any layout")):
        handles.append(axis.plot([], [], "D", color=color, label=label)[0])
    roofs = (("-", f"copy of {max(run.copy_rates) // 1_000_000} MB"), (":", "copy in cache")) if run.copy_rates else ()
    for style, label in roofs:
        handles.append(axis.plot([], [], style, color="0.35", label=label)[0])
    figure.legend(handles=handles, loc="outside lower center", ncols=7, frameon=False)


def main(arguments: list[str] | None = None) -> int:
    from .suite import Run  # which imports this module

    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    return write_again(parser, arguments, "make bench", Run.load, write)


if __name__ == "__main__":
    sys.exit(main())
