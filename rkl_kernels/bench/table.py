"""Rows as a table in plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .row import OURS, Row


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the values there are; None where there is none."""
    logs = [math.log(v) for v in values if v]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _milliseconds(row: Row, name: str) -> str:
    if name in row.times:
        return f"{row.times[name].seconds * 1e3:.3g}"
    return row.rejected.get(name, "-").split(":")[0]


COLUMNS = (
    "case",
    "floor ms",
    "ours nchw",
    "ours nhwc",
    "eager nchw",
    "eager nhwc",
    "best rival",
    "x nchw",
    "x nhwc",
    "x best",
    "of floor",
    "±",
)


def cells(row: Row) -> list[str]:
    """One line of a table, in the order of :data:`COLUMNS`."""
    times = [_milliseconds(row, f"{name} {layout}") for name in (OURS, "eager") for layout in ("nchw", "nhwc")]
    ratios = [row.same_layout("nchw"), row.same_layout("nhwc"), row.over_best()]
    return [
        row.case.id,
        f"{row.floor * 1e3:.3g}",
        *times,
        row.best(mine=False) or "-",
        *[_cell(r, ".2f") for r in ratios],
        _cell(row.of_floor(), ".0%"),
        _cell(row.noise(), ".0%"),
    ]


def summary(rows: Sequence[Row]) -> list[str]:
    """Geometric means over the rows, and the lowest, in the order of :data:`COLUMNS`."""
    means = [
        geometric_mean(r.same_layout("nchw") for r in rows),
        geometric_mean(r.same_layout("nhwc") for r in rows),
        geometric_mean(r.over_best() for r in rows),
    ]
    lowest = min((r for r in (row.over_best() for row in rows) if r), default=None)
    name = f"geometric mean of {len(rows)}" + (f" (lowest x best {lowest:.2f})" if lowest else "")
    blank = [""] * 6
    return [
        name,
        *blank,
        *[_cell(m, ".2f") for m in means],
        _cell(geometric_mean(r.of_floor() for r in rows), ".0%"),
        "",
    ]


def align(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text in columns: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, with their geometric means and with why contestants were not timed."""
    lines = [list(COLUMNS), *map(cells, rows)] + ([summary(rows)] if len(rows) > 1 else [])
    notes = [f"not timed: {row.case.id}, {name}: {why}" for row in rows for name, why in row.rejected.items()]
    return "\n".join([align(lines), *notes])
