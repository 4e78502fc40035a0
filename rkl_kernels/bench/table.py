"""Formats rows as a table in plain text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .row import OURS, Row


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of the values that are not None. None where all are."""
    logs = [math.log(v) for v in values if v]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _cell(value: float | None, form: str) -> str:
    """A formatted value: "-" where it was not measured, "?" where it is unknown, like the noise of a single sample."""
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else "?"


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
    "faulting",
    "of floor",
    "±",
)
WIDTHS = (40, 10, 11, 11, 12, 12, 18, 9, 9, 8, 10, 10, 6)


def cells(row: Row) -> list[str]:
    """The cells of a row, in the order of :data:`COLUMNS`."""
    times = [_milliseconds(row, f"{name} {layout}") for name in (OURS, "eager") for layout in ("nchw", "nhwc")]
    ratios = [row.same_layout("nchw"), row.same_layout("nhwc"), row.over_best(), row.same_layout_faulting("nhwc")]
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
    """Geometric means over the rows, and the lowest ratio to the best rival, in the order of :data:`COLUMNS`."""
    means = [
        geometric_mean(r.same_layout("nchw") for r in rows),
        geometric_mean(r.same_layout("nhwc") for r in rows),
        geometric_mean(r.over_best() for r in rows),
        geometric_mean(r.same_layout_faulting("nhwc") for r in rows),
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


def line(texts: Sequence[str]) -> str:
    """Cells in fixed columns: the first aligned to the left, the others to the right."""
    return f"{texts[0]:<40}" + "".join(text.rjust(WIDTHS[i]) for i, text in enumerate(texts[1:], start=1))


def notes(row: Row) -> list[str]:
    """One line for each contestant that was not timed, with the reason."""
    return [f"not timed: {row.case.id}, {name}: {why}" for name, why in row.rejected.items()]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, then the reasons why contestants were not timed."""
    return "\n".join(
        [line(COLUMNS), *(line(cells(row)) for row in rows), *(note for row in rows for note in notes(row))]
    )
