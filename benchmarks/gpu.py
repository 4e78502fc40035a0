"""Everything that wants a GPU, in one command, ``make gpu``: tests, then measurements.

Needs torch, Triton, NumPy, matplotlib and pytest, no network. Whatever fails is reported and the rest goes on: what
runs on the device has a process of its own, which is replaced when a kernel breaks it or hangs. Writes
benchmarks/results/<device>.json, .md and .png, and the planner's table, which the package takes from
rkl_kernels/planner_table.json. ``--device cpu`` tries all of it on tiny shapes without a GPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import rkl_kernels as rk
from rkl_kernels import fusion
from rkl_kernels.bench import Case, compiled, eager, measure, ours
from rkl_kernels.bench.machine import machine, machine_line, slug
from rkl_kernels.bench.rivals import TYPES, Rival
from rkl_kernels.bench.row import Row
from rkl_kernels.bench.table import geometric_mean
from rkl_kernels.bench.timing import copier, interleave, multiplier, timer_for

from . import models, report
from .shapes import SHAPES, Shape
from .suite import RESULTS, Run
from .worker import Worker

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("mnv1-112", "xcep-147", "cnx-56", "rep-32-k13", "kb-82", "one-112", "rkl-16-k7")
TRELU = ("mnv1-112", "kb-82", "one-112")
MOST_BUDGET = 0.6
"""Seconds of timing a row at most: a hundred samples of a kernel of a millisecond, for eight contestants."""
ROW_SECONDS, COMPILER_SECONDS = 60.0, 150.0
"""What takes longer hangs; the second where the compiler takes part."""
LAYOUTS = ("nhwc", "nchw")


@dataclass
class Deadline:
    """What is left of the time for everything."""

    end: float

    def left(self) -> float:
        return self.end - time.perf_counter()


def attempt(title: str, work: Callable[[], Any]) -> Any:
    """``work()``, or None and its error in print: one failure must not cost the rest of the run."""
    try:
        return work()
    except Exception:
        print(f"-- failed: {title}", traceback.format_exc(), sep="\n", flush=True)
        return None


def run_tests(device: str, timeout: float) -> str:
    """The tests for a GPU, then a few of them under compute-sanitizer; the verdicts in one line."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--device", device, "-p", "no:cacheprovider"]
    verdicts = [_verdict("tests", command, timeout)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and device == "cuda":
        small = [sanitizer, "--error-exitcode", "9", *command, "-k", "small"]
        verdicts.append(_verdict("compute-sanitizer", small, timeout))
    return "; ".join(verdicts)


def _verdict(name: str, command: list[str], timeout: float) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=timeout, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"{name}: not done after {timeout:.0f} s"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no output"]
    if done.returncode:
        print("\n".join(lines[-60:]), flush=True)
    return f"{name}: {lines[-1].strip('= ')}"


def cases(device: str, quick: bool) -> Iterator[Case]:
    """The rows, 16 bits first: depthwise forward and both gradients, separable forward and backward, T-ReLU."""
    shapes = [shape for shape in SHAPES if not quick or shape.id in QUICK]
    for dtype in ("bf16", "fp32"):
        for shape in shapes:
            for operator, directions in _operators(shape):
                for direction in directions:
                    case = shape.case(operator, direction, dtype, device)
                    yield case if device == "cuda" else _tiny(case)


def _operators(shape: Shape) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "depthwise", ("forward", "data", "weight")
    if shape.out_channels:
        yield "separable", ("forward", "backward")
    if shape.id in TRELU:
        yield "trelu", ("forward", "backward")


def _tiny(case: Case) -> Case:
    """The same case at a size that a CPU does at once, to try the program itself."""
    span = case.dilation * (case.kernel - 1)
    size = min(case.height, max(8, span + 1 - 2 * case.padding))
    outputs = min(case.out_channels, 16)
    return replace(case, batch=2, channels=min(case.channels, 16), out_channels=outputs, height=size, width=size)


def fused_or_not(fused: bool, layout: str) -> Rival:
    """The Triton separable operator as one kernel, or composed."""
    name = "fused" if fused else "composed"

    def prepare(case: Case, device: str) -> Callable[[], Any]:
        run = ours(layout, "triton").prepare(case, device)

        def forced() -> Any:
            with fusion.use_fusion(fused):
                return run()

        return forced

    return Rival(f"ours-triton-{name}", layout, prepare)


def contestants(case: Case, device: str, compile_too: bool) -> list[Rival]:
    """This package by its own choice and by each backend, PyTorch (cuDNN or native, as it chooses), the compiler."""
    chosen = []
    for layout in LAYOUTS:
        chosen += [ours(layout), eager(layout)]
        chosen += [ours(layout, name) for name in ("cuda", "triton") if rk.backends()[name].available]
    if case.operator == "separable" and rk.backends()["triton"].available:
        chosen += [fused_or_not(fused, "nhwc") for fused in (True, False)]
    if compile_too:
        chosen.append(compiled("nhwc", "max-autotune-no-cudagraphs" if device == "cuda" else "default"))
    return chosen


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


def compiler_may_win(case: Case) -> bool:
    """Where two steps can fuse, and T-ReLU: a convolution alone is a black box to the compiler."""
    return case.dtype == "bf16" and case.operator in ("separable", "trelu") and case.name in QUICK


def measure_row(case: Case, device: str, compile_too: bool, budget: float) -> tuple[Row, bool]:
    """A row, and whether the device still answers after it."""
    row = measure(case, contestants(case, device, compile_too), device, budget)
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return row, False
    return row, True


def measure_rows(run: Run, device: str, quick: bool, deadline: Deadline, worker: Worker) -> None:
    """Every row that the time reaches; with what is left some of them again, beside the compiler, whose tuning is
    slow."""
    chosen = [(case, False) for case in cases(device, quick)]
    chosen += [(case, True) for case, _ in chosen if compiler_may_win(case)]
    rows: dict[str, Row] = {}
    slowest = 0.0  # seconds of a row with the compiler: another one may take as long
    for number, (case, compile_too) in enumerate(chosen):
        left = deadline.left()
        if left < 0 or (compile_too and left < slowest):
            run.left_out += [] if compile_too else [case.id]
            continue
        budget = min(MOST_BUDGET, left / (len(chosen) - number) / 2)
        limit = COMPILER_SECONDS if compile_too else ROW_SECONDS
        answer = attempt(case.id, partial(worker.call, limit, measure_row, case, device, compile_too, budget))
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


def measure_step(device: str, budget: float) -> models.ModelRow:
    """One ResNet-KL training step and its peak memory, on this package and on PyTorch."""
    model = replace(models.MODELS[0], batch=256 if device == "cuda" else 1)
    start = model.build()
    row = models.ModelRow(model.name, "training step", model.batch, model.size)
    runs = {}
    for variant in models.VARIANTS:
        if prepared := attempt(variant, partial(_prepared, model, variant, start, device)):
            runs[variant] = prepared.step
        else:
            row.rejected[variant] = "fails"
    row.times = interleave(runs, timer_for(device), budget)
    if device == "cuda":
        row.memory = {variant: _peak(step) for variant, step in runs.items()}
    return row


def _prepared(model: models.Model, variant: str, start: Any, device: str) -> models.Prepared:
    prepared = models.Prepared(model, variant, start, device)
    prepared.step()
    return prepared


def _peak(step: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def planner_table(rows: list[Row]) -> dict[str, str]:
    """The package's table (rkl_kernels/fusion.py): for each separable shape, the faster of the fused and the composed
    Triton path; for each operator, the backend that is faster in the geometric mean."""
    table = {}
    for row in rows:
        times = {name: row.times.get(f"ours-triton-{name} nhwc") for name in ("fused", "composed")}
        if row.case.operator != "separable" or None in times.values():
            continue
        c, backward = row.case, row.case.direction == "backward"
        pixels = c.height * c.width, c.out_height * c.out_width
        element = TYPES[c.dtype].itemsize
        work = fusion.Separable(c.batch, c.channels, c.out_channels, *pixels, c.kernel**2, element, backward)
        table[work.key] = min(times, key=lambda name: times[name].seconds)  # type: ignore[union-attr]
    for operator in ("trelu", "depthwise", "separable"):
        pairs = [[_fastest(row, name) for name in ("cuda", "triton")] for row in rows if row.case.operator == operator]
        ratio = geometric_mean(cuda / triton for cuda, triton in pairs if cuda and triton)
        if ratio is not None:
            table[operator if operator == "trelu" else f"{operator}_conv2d"] = "triton" if ratio > 1 else "cuda"
    return table


def _fastest(row: Row, backend: str) -> float | None:
    """Seconds of a backend in its better layout."""
    return min((t.seconds for name, t in row.times.items() if name.startswith(f"ours-{backend} ")), default=None)


def save_planner_table(rows: list[Row], device: str, out: Path) -> None:
    """Into ``out`` beside the results, and for the package where it was measured on a GPU."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    path = out / f"{slug(machine(device))}.planner.json"
    targets = [path] + ([fusion.TABLE] if device == "cuda" else [])
    for target in targets:
        known = json.loads(target.read_text()) if target.exists() else {}
        draft = target.with_suffix(".tmp")
        draft.write_text(json.dumps(known | {name: planner_table(rows)}, indent=1, sort_keys=True) + "\n")
        draft.replace(target)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="2 minutes: a few shapes")
    parser.add_argument("--within", type=float, help="seconds for everything; 450, or 110 with --quick")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--no-tests", action="store_true", help="measurements only")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees, got none; --device cpu tries the program without one")
    start = time.perf_counter()
    within = options.within or (110 if options.quick else 450)
    deadline = Deadline(start + within)
    run = Run(machine(options.device))
    print(machine_line(run.machine))
    for name, status in rk.backends().items():
        print(f"  {name:<10} {'yes' if status.available else 'no ':<4} {status.reason}")
    if not options.no_tests:
        print(attempt("tests", lambda: run_tests(options.device, within / 4)), flush=True)
    worker = Worker()
    measured = partial(worker.call, ROW_SECONDS, measure_machine, options.device, within / 100)
    rates = attempt("copy bandwidth and matrix rate", measured)
    if rates:
        run.copy_rates, run.matrix_rates = rates
    step = partial(worker.call, ROW_SECONDS, measure_step, options.device, within / 40)
    row = attempt("ResNet-KL training step", step)
    run.models += [row] if row else []
    measure_rows(run, options.device, options.quick, deadline, worker)
    worker.stop()
    run.seconds = time.perf_counter() - start
    path = options.out / f"{slug(run.machine)}.json"
    run.save(path)
    attempt("report", lambda: report.write(run, path))
    attempt("planner table", lambda: save_planner_table(run.rows, options.device, options.out))
    print(f"{run.seconds:.0f} s; written: {path} and beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
