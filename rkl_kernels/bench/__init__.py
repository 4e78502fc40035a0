"""The benchmark harness: times this package's operators and their rivals in rounds, and compares them with the floor.

It works from an installed wheel, with torch and NumPy. ONNX Runtime and OpenVINO are timed where they are installed::

    from rkl_kernels import bench
    print(bench.operator_report("separable", (32, 128, 56, 56), kernel=5))      # what `rkl bench` prints
    for line in bench.four_lines(): print(line)                                 # what a demo prints at its end

``benchmarks/`` in the source tree runs the same harness over the shapes of published models.

    case.py      what is timed, and the least bytes and operations that it needs
    rivals.py    the contestants on PyTorch tensors, the inputs, the float64 reference
    runtimes.py  ONNX Runtime and OpenVINO
    timing.py    clocks (CPU, CUDA), rounds, medians and their noise
    faulting.py  contestants timed again in a process with the default allocator
    memory.py    a step's peak memory
    machine.py   one line that describes the machine
    host.py      the host's time for a call
    row.py       one case measured on all contestants, and its ratios
    table.py     rows as text
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..allocator import keep_freed_memory
from . import runtimes
from .case import Case
from .host import report as host_report
from .machine import capacity, check_device, machine, machine_line
from .rivals import FORMATS, Rival, compiled, eager, ours
from .row import Row, measure
from .table import table

__all__ = ["Case", "Row", "contestants", "four_lines", "host_report", "measure", "operator_report"]

LAYOUTS = tuple(FORMATS)
RIVALS = ("eager", "compile", *runtimes.NAMES)


def contestants(rivals: Sequence[str] = ("eager",), layouts: Sequence[str] = LAYOUTS) -> list[Rival]:
    """This package in each layout, then each named rival in the layouts that it supports."""
    chosen = [ours(layout) for layout in layouts]
    for name in rivals:
        if name in ("eager", "compile"):
            chosen += [{"eager": eager, "compile": compiled}[name](layout) for layout in layouts]
        elif "nchw" in layouts:
            chosen.append(runtimes.rival(name))
    return chosen


def operator_report(
    operator: str,
    shape: Sequence[int],
    kernel: int = 3,
    *,
    kernel_width: int | None = None,
    out_channels: int | None = None,
    stride: int = 1,
    dilation: int = 1,
    padding: int | None = None,
    dtype: str = "fp32",
    layout: str | None = None,
    direction: str = "forward",
    device: str = "cpu",
    seconds: float = 5.0,
) -> str:
    """Time one operator on one shape against every rival that is installed.

    Args:
        operator: "trelu", "depthwise" or "separable".
        shape: (N, C, H, W) of the image.
        kernel, stride, dilation, padding: of the depthwise step. The default padding keeps the image's size.
        kernel_width: the filter's width, where it differs from the height.
        out_channels: of the separable convolution. C by default.
        dtype: "fp32", "bf16" or "fp16".
        layout: "nchw", "nhwc" or None for both.
        direction: "forward", "backward", "data" or "weight".
        device: "cpu" or "cuda".
        seconds: timing for all contestants together.

    Returns:
        The machine's line, a table of one row, and every contestant's time.

    Raises:
        ValueError: an argument is out of range. The message names it.
    """
    if len(shape) != 4:
        raise ValueError(f"shape must be N,C,H,W, got {','.join(map(str, shape))}")
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    check_device(device)
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a positive number, got {seconds!r}")
    batch, channels, height, width = shape
    if padding is None:
        padding = dilation * (min(kernel, kernel_width or kernel) - 1) // 2
    case = Case(
        operator,
        batch,
        channels,
        height,
        width,
        out_channels=channels if out_channels is None else out_channels,
        kernel=kernel,
        kernel_width=kernel_width,
        stride=stride,
        dilation=dilation,
        padding=padding,
        dtype=dtype,
        direction=direction,
    )
    if case.bytes > (most := capacity(device)):
        raise ValueError(
            f"shape must fit into the {most / 1e9:.0f} GB of memory, got {','.join(map(str, shape))}: "
            f"{case.bytes / 1e9:.3g} GB; give a smaller one"
        )
    keep_freed_memory()
    rivals = ["eager", "compile"]
    if runtimes.serves(case, device):
        rivals += [name for name in runtimes.NAMES if runtimes.installed(name)]
    row = measure(case, contestants(rivals, LAYOUTS if layout is None else (layout,)), device, seconds)
    others = [f"{name}: {timing.seconds * 1e3:.3g} ms" for name, timing in row.times.items()]
    return "\n".join([machine_line(machine(device)), table([row]), ", ".join(others)])


def four_lines(seconds: float = 10.0, batch: int = 16) -> list[str]:
    """The machine's line, then the three operators on a layer of ResNet-KL in fp32, against PyTorch's better layout.

    Args:
        seconds: for everything. About two thirds go to timing, the rest to making and checking the inputs.
        batch: images in a call.
    """
    keep_freed_memory()
    lines = [machine_line(machine())]
    for operator, title in (
        ("trelu", "T-ReLU"),
        ("depthwise", "depthwise 7x7"),
        ("separable", "separable 7x7"),
    ):
        parts = []
        for direction in ("forward", "backward"):
            case = Case(operator, batch, 64, 32, 32, out_channels=64, kernel=7, padding=3, direction=direction)
            row = measure(case, contestants(), budget=seconds / 9)
            faster, share = row.over_best(), row.of_floor()
            parts.append(
                f"{direction} not measured: {'; '.join(row.rejected.values())}"
                if faster is None or share is None
                else f"{direction} {faster:.1f}x PyTorch ({share:.0%} of the floor)"
            )
        lines.append(f"{title:<14} {batch} x 64 x 32 x 32: {', '.join(parts)}")
    return lines
