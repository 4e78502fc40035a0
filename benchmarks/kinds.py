"""A record's means by kind of layer, as in docs/performance.md: ``python -m benchmarks.kinds FILE.json``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rkl_kernels.bench.row import Row
from rkl_kernels.bench.table import geometric_mean

from .report import DTYPES, counted, markdown_table, times
from .shapes import SHAPES
from .suite import Run

PUBLISHED, ALL = "layers of published models", "all"
OTHERS = {"KernelBench": "KernelBench's", "ResNet-KL": "ResNet-KL's", "one image": "one small image"}
"""The kind of a shape whose source is no published model, by the source."""
KINDS = (PUBLISHED, *OTHERS.values(), ALL)
HEADER = (
    "",
    "rows",
    "contiguous: fp32, bf16",
    "channels_last: fp32, bf16",
    "best, fp32 (lowest; rows below 1)",
    "best, bf16",
    "channels_last, faulting: fp32, bf16",
)


def names_of(kind: str) -> set[str]:
    """The ids of a kind's shapes. A shape is of one kind, beside "all"."""
    return {shape.id for shape in SHAPES if kind in (OTHERS.get(shape.source, PUBLISHED), ALL)}


def of_kind(rows: Sequence[Row], operator: str, direction: str, kind: str) -> dict[str, list[Row]]:
    """The rows of a kind, by type."""
    names = names_of(kind)
    return {
        dtype: [
            row
            for row in rows
            if (row.case.operator, row.case.direction, row.case.dtype) == (operator, direction, dtype)
            and row.case.name in names
        ]
        for dtype in DTYPES
    }


def means(group: dict[str, list[Row]], ratio: Callable[[Row], float | None]) -> str:
    """Geometric means of a ratio, by type."""
    return ", ".join(times(geometric_mean(ratio(row) for row in rows)) for rows in group.values())


def best(rows: Sequence[Row]) -> str:
    """Our better layout over the best rival in any layout: the mean, the lowest, and how many ratios are below 1."""
    ratios = [ratio for row in rows if (ratio := row.over_best())]
    if not ratios:
        return "-"
    below = sum(ratio < 1 for ratio in ratios)
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f}; {below or 'none'})"


def lines(run: Run) -> list[list[str]]:
    """A line for each operator, direction and kind of which the run has rows."""
    found = []
    for operator in ("trelu", "depthwise", "separable"):
        for direction in ("forward", "backward"):
            for kind in KINDS:
                group = of_kind(run.rows, operator, direction, kind)
                if any(group.values()):
                    layouts = [means(group, partial(Row.same_layout, layout=layout)) for layout in ("nchw", "nhwc")]
                    faulting = means(group, partial(Row.same_layout_faulting, layout="nhwc"))
                    head = [f"{operator} {direction}, {kind}", counted(*group.values())]
                    found.append([*head, *layouts, *(best(rows) for rows in group.values()), faulting])
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kinds", description=__doc__)
    parser.add_argument("record", type=Path, metavar="FILE.json")
    path = parser.parse_args(arguments).record
    try:
        run = Run.load(path)
    except ValueError as problem:
        parser.error(f"FILE.json {problem}; `make bench` writes one")
    print(markdown_table(HEADER, lines(run)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
