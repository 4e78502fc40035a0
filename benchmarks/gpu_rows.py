"""Rows on a GPU: the contestants, and the loop that measures row after row in a separate process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import rkl_kernels as rk
from rkl_kernels.bench import Case, compiled, eager, measure, ours
from rkl_kernels.bench.rivals import TYPES, Rival
from rkl_kernels.bench.row import Row
from rkl_kernels.bench.timing import copier, interleave, multiplier, timer_for

from .gpu_groups import QUICK
from .gpu_report import GpuRun
from .worker import Worker

MOST_BUDGET = 0.6
"""The most seconds of timing a row: tens of samples of each contestant."""
ROW_SECONDS, COMPILER_SECONDS = 60.0, 150.0
"""Seconds after which a row counts as hung, without and with the compiler."""
LAYOUTS = ("nhwc", "nchw")


@dataclass
class Deadline:
    """The end of the time for everything, by ``time.perf_counter()``."""

    end: float

    def left(self) -> float:
        return self.end - time.perf_counter()


def attempt(run: GpuRun, title: str, work: Callable[[], Any]) -> Any:
    """The result of ``work()``. If it fails, print the error, note it in the run and return None: one failure must not
    end the run."""
    try:
        return work()
    except Exception:  # any error: it is printed, and the rest is measured
        error = traceback.format_exc().rstrip()
        print(f"-- failed: {title}", error, sep="\n", flush=True)
        run.failed[title] = f"fails: {error.splitlines()[-1]}"  # a worker's error ends in its own last line
        return None


def titled(name: str, compile_too: bool) -> str:
    """What a row or model is called where it was not reached or failed."""
    return f"{name}, with torch.compile" if compile_too else name


def gpu_contestants(device: str, compile_too: bool) -> list[Rival]:
    """This package with the backend that it chooses, in both layouts, and with each backend in NHWC; PyTorch (cuDNN or
    native, as it chooses) in both layouts; its compiler in both layouts, if ``compile_too``."""
    chosen = []
    for layout in LAYOUTS:
        chosen += [ours(layout), eager(layout)]
        if compile_too:
            chosen.append(compiled(layout, "max-autotune-no-cudagraphs" if device == "cuda" else "default"))
    chosen += [ours("nhwc", name) for name in ("cuda", "triton") if rk.backends()[name].available]
    return chosen


def compiler_may_win(case: Case) -> bool:
    """Whether the compiler has something to fuse: two steps, or T-ReLU. A convolution alone is a black box to it."""
    return case.dtype == "bf16" and case.operator in ("separable", "trelu") and case.name in QUICK


def measure_machine(device: str, budget: float) -> tuple[dict[int, float], dict[str, float]]:
    """Copy bandwidth from 1 MB to 2 GB moved, and the matrix rate of each type."""
    sizes = [2**n * 1_000_000 for n in range(12 if device == "cuda" else 5)]
    timer = timer_for(device)
    times = interleave({str(size): copier(size, device) for size in sizes}, timer, budget)
    copy_rates = {size: size / times[str(size)].seconds for size in sizes}
    matrix_rates = {}
    for dtype in ("fp32", "bf16"):
        product, operations = multiplier(TYPES[dtype], device)
        matrix_rates[dtype] = operations / interleave({dtype: product}, timer, budget / 2)[dtype].seconds
    return copy_rates, matrix_rates


def measure_row(case: Case, device: str, compile_too: bool, budget: float) -> tuple[Row, bool]:
    """The row, and whether the device still answers after it."""
    row = measure(case, gpu_contestants(device, compile_too), device, budget)
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return row, False
    return row, True


def measure_rows(run: GpuRun, cases: list[Case], device: str, deadline: Deadline, worker: Worker) -> None:
    """Every row for which there is time. With the time left, some of them again with the compiler, whose tuning is
    slow."""
    chosen = [(case, False) for case in cases]
    chosen += [(case, True) for case in cases if compiler_may_win(case)]
    rows: dict[str, Row] = {}
    slowest = 0.0  # seconds of the slowest row with the compiler: the next may take as long
    for number, (case, compile_too) in enumerate(chosen):
        left = deadline.left()
        if left < 0 or (compile_too and left < slowest):
            run.left_out.append(titled(case.id, compile_too))
            continue
        budget = min(MOST_BUDGET, left / (len(chosen) - number) / 2)
        limit = COMPILER_SECONDS if compile_too else ROW_SECONDS
        work = partial(worker.call, limit, measure_row, case, device, compile_too, budget)
        answer = attempt(run, titled(case.id, compile_too), work)
        if compile_too:
            slowest = max(slowest, left - deadline.left())
        if answer is None:
            continue
        rows[case.id], answers = answer
        run.rows[:] = rows.values()
        print_row(rows[case.id])
        if not answers:
            print("    the device does not answer any more: going on in a new process", flush=True)
            worker.stop()


def print_row(row: Row) -> None:
    share, times = row.of_floor() or 0.0, row.over_best() or 0.0
    print(f"{row.case.id:<40} {times:5.2f}x the best rival, {share:4.0%} of the floor", flush=True)
    for name, why in row.rejected.items():
        print(f"    {name} {why}", flush=True)
