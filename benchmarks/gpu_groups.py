"""What ``make gpu`` measures, group by group, and the bars that each group's figures should meet.

A row is measured once and may be in several groups. 16 bits come first, then KernelBench's own shapes, then fp32 with
TF32 off, then TF32. Where time runs out, the last ones are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rkl_kernels.bench import Case
from rkl_kernels.bench.row import OURS, Row
from rkl_kernels.bench.table import geometric_mean

from .shapes import SHAPES, Shape

QUICK = ("mnv1-112", "xcep-147", "cnx-56", "rep-32-k13", "kb-82", "one-112", "rkl-16-k7")
TRELU = ("mnv1-112", "kb-82", "one-112")
PUBLISHED_KB82 = 1.225
"""Milliseconds of the best known kernel for KernelBench level 1 no. 82, fp32, on an H100."""

Figure = Callable[[Sequence[Row]], float | None]


@dataclass(frozen=True)
class Bar:
    """A figure of a group's rows, and the least (or most) that it should be."""

    what: str
    bar: float
    figure: Figure
    form: str = ".2f"
    at_most: bool = False

    def met(self, found: float) -> bool:
        return found <= self.bar if self.at_most else found >= self.bar


@dataclass(frozen=True)
class Group:
    """Rows that answer one question. ``--only`` takes the ``name``."""

    name: str
    title: str
    has: Callable[[Case], bool]
    bars: tuple[Bar, ...]


def _of(rows: Sequence[Row], directions: str) -> list[Row]:
    return [row for row in rows if row.case.direction in directions.split()]


def over_best(row: Row, layout: str | None = None) -> float | None:
    """How many times we are faster in NHWC than the best rival in any layout, or in ``layout`` than the best in it."""
    rivals = [name for name in row.times if not name.startswith(OURS) and name.endswith(layout or "")]
    best = min(rivals, key=lambda name: row.times[name].seconds, default=None)
    return row.ratio(best, f"{OURS} {layout or 'nhwc'}")


def _share(least: float, directions: str, smallest: int = 0) -> Bar:
    where = f", maps of {smallest} px and more" if smallest else ""

    def figure(rows: Sequence[Row]) -> float | None:
        return geometric_mean(
            row.of_floor(f"{OURS} nhwc") for row in _of(rows, directions) if row.case.height >= smallest
        )

    return Bar(f"{directions.replace(' ', ', ')}: of the floor, NHWC, geometric mean{where}", least, figure, ".0%")


def _times(least: float, directions: str) -> Bar:
    what = f"{directions.replace(' ', ', ')}: x the best rival, NHWC, geometric mean"
    return Bar(what, least, lambda rows: geometric_mean(over_best(row) for row in _of(rows, directions)))


def _lowest(least: float, directions: str, layout: str | None = None) -> Bar:
    where = layout.upper() if layout else "NHWC"
    what = f"{directions.replace(' ', ', ')}: x the best rival{' in ' + where if layout else ', ' + where}, lowest"
    return Bar(
        what,
        least,
        lambda rows: min((x for row in _of(rows, directions) if (x := over_best(row, layout))), default=None),
    )


def _kb82(rows: Sequence[Row]) -> float | None:
    times = [row.times[f"{OURS} nchw"].seconds for row in rows
             if (row.case.name, row.case.precision) == ("kb-82", "fp32") and f"{OURS} nchw" in row.times]  # fmt: skip
    return min(times) * 1e3 if times else None


def _square(case: Case, *kernels: int, stride: int = 1, operator: str = "depthwise") -> bool:
    """Whether a case has a square filter of one of these sizes, in bf16 and without dilation."""
    return (case.operator, case.dtype, case.stride, case.dilation) == (operator, "bf16", stride, 1) and (
        case.kernel == case.filter_width and case.kernel in kernels
    )


def _narrow(case: Case) -> bool:
    return _square(case, 3, operator="separable") and max(case.channels, case.out_channels) <= 128


def _kernel_bench(case: Case) -> bool:
    return case.name.startswith("kb-") and case.operator == ("separable" if case.name == "kb-86" else "depthwise")


GROUPS = (
    Group("trelu", "T-ReLU in 16 bits, 64 MB and more",
          lambda c: (c.operator, c.dtype) == ("trelu", "bf16") and c.bytes >= 64_000_000,
          (_share(0.95, "forward"), _share(0.95, "backward"))),
    Group("depthwise", "Depthwise 3 x 3, bf16: forward, image's gradient",
          lambda c: _square(c, 3) and c.direction in ("forward", "data"),
          (_share(0.85, "forward data", 28), _times(1.5, "forward data"), _lowest(1.0, "forward data"))),
    Group("gradients", "Depthwise 3 x 3, bf16: both gradients, filter's gradient",
          lambda c: _square(c, 3) and c.direction in ("backward", "weight"),
          (_share(0.75, "backward"), _times(3.0, "backward"))),
    Group("wide", "Depthwise 5 x 5 and 7 x 7, bf16", lambda c: _square(c, 5, 7),
          (_times(2.5, "forward"), _times(3.5, "backward"))),
    Group("large", "Depthwise 9 x 9 to 31 x 31, bf16", lambda c: _square(c, *range(9, 32)),
          (_share(0.35, "forward data weight backward"),)),
    Group("dilated", "Depthwise with dilation, bf16",
          lambda c: (c.operator, c.dtype) == ("depthwise", "bf16") and c.dilation > 1,
          (_share(0.6, "forward"), _share(0.5, "weight"), _times(2.0, "forward weight"))),
    Group("stride2", "Depthwise 3 x 3 at stride 2, bf16", lambda c: _square(c, 3, stride=2),
          (_times(1.4, "forward"), _times(2.0, "backward"))),
    Group("separable", "Separable forward, 3 x 3, up to 128 channels, bf16",
          lambda c: _narrow(c) and c.direction == "forward", (_share(0.75, "forward"), _times(1.8, "forward"))),
    Group("separable-wide", "Separable forward of more channels or other filters, and backward, bf16",
          lambda c: (c.operator, c.dtype) == ("separable", "bf16") and not (_narrow(c) and c.direction == "forward"),
          (_times(1.15, "forward"), _times(1.6, "backward"))),
    Group("nchw", "Contiguous images, bf16", lambda c: c.dtype == "bf16" and c.operator != "trelu",
          (_lowest(1.0, "forward data weight backward", "nchw"),)),
    Group("latency", "One image, bf16: the call decides", lambda c: (c.name, c.dtype) == ("one-112", "bf16"),
          (_lowest(1.0, "forward data weight backward"),)),
    Group("kernelbench", "KernelBench level 1, numbers 82 to 86: fp32 as given (NCHW), and bf16", _kernel_bench,
          (_lowest(1.0, "forward", "nchw"), _lowest(1.0, "forward"),
           Bar("kb-82, fp32, NCHW: ms (best published, H100)", PUBLISHED_KB82, _kb82, ".3f", at_most=True))),
    Group("fp32", "Depthwise, fp32 without TF32", lambda c: (c.operator, c.precision) == ("depthwise", "fp32"),
          (_share(0.8, "forward data weight backward"), _lowest(1.0, "forward data weight backward"))),
    Group("fp32-others", "Separable and T-ReLU, fp32 without TF32",
          lambda c: c.precision == "fp32" and c.operator != "depthwise",
          (_lowest(1.0, "forward backward"),)),
    Group("tf32", "fp32 with TF32 on both sides", lambda c: c.tf32, (_lowest(1.0, "forward backward"),)),
)  # fmt: skip


def cases(device: str, quick: bool = False, only: Sequence[str] = ()) -> list[Case]:
    """The rows in the order of their groups. ``only`` restricts them to the named groups."""
    there = [case for case in _all(device) if not quick or case.name in QUICK]
    groups = [group for group in GROUPS if not only or group.name in only]
    ordered = dict.fromkeys(case for group in groups for case in there if group.has(case))
    return [case if device == "cuda" else _tiny(case) for case in ordered]


def _all(device: str) -> Iterator[Case]:
    for shape in SHAPES:
        for operator, directions in _operators(shape):
            for direction in directions:
                yield shape.case(operator, direction, "bf16", device)
                yield (exact := shape.case(operator, direction, "fp32", device))
                if operator == "separable":  # a depthwise step alone has no products for tensor cores
                    yield replace(exact, tf32=True)


def _operators(shape: Shape) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "depthwise", ("forward", "data", "weight", "backward")
    if shape.out_channels:
        yield "separable", ("forward", "backward")
    if shape.id in TRELU:
        yield "trelu", ("forward", "backward")


def _tiny(case: Case) -> Case:
    """The same case, so small that a CPU does it at once, to try the program itself."""
    height, width = (
        min(size, max(8, case.dilation * (kernel - 1) + 1 - 2 * case.padding))
        for size, kernel in ((case.height, case.kernel), (case.width, case.filter_width))
    )
    outputs = min(case.out_channels, 16)
    return replace(case, batch=2, channels=min(case.channels, 16), out_channels=outputs, height=height, width=width)
