"""All GPU tests and measurements in one command, ``make gpu``.

Needs torch, Triton, NumPy, matplotlib and pytest, but no network. Uses pytest-xdist, timm and ncu where they are
installed. A failure is reported, and the rest goes on: work on the device has its own process, which is replaced when
a kernel breaks it or hangs. Writes benchmarks/results/<device>.json, .md and .png. ``--only depthwise`` measures one
group in 20 seconds. ``--device cpu`` tries everything on tiny shapes without a GPU. The exit code is 1 if a test fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

import rkl_kernels as rk
from rkl.training.files import check_writable
from rkl_kernels.bench.machine import machine, machine_line, slug

from . import gpu_counters, gpu_groups, gpu_host, gpu_models, gpu_report
from .arguments import positive, writing
from .gpu_report import GpuRun
from .gpu_rows import (
    COMPILER_SECONDS,
    ROW_SECONDS,
    Deadline,
    attempt,
    measure_machine,
    measure_rows,
    titled,
)
from .suite import RESULTS, written
from .worker import Worker

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("tests", "models", "host", "counters")
NAMES = (*OTHERS, *(group.name for group in gpu_groups.GROUPS))
TEST_PROCESSES = 6
"""Each test process compiles Triton's kernels for itself. More processes than this compete to compile the same ones."""


def run_tests(device: str, timeout: float) -> tuple[str, bool]:
    """Run the GPU tests, then a few of them under compute-sanitizer.

    Returns:
        The verdicts in one line, and whether all passed.
    """
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--device", device, "-p", "no:cacheprovider"]
    parallel = ["-n", str(TEST_PROCESSES)] if importlib.util.find_spec("xdist") else []
    verdicts = [_verdict("tests", command + parallel, timeout)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and device == "cuda":
        small = [sanitizer, "--error-exitcode", "9", *command, "-k", "small"]
        verdicts.append(_verdict("compute-sanitizer", small, timeout))
    return "; ".join(text for text, _ in verdicts), all(passed for _, passed in verdicts)


def _verdict(name: str, command: list[str], timeout: float) -> tuple[str, bool]:
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=timeout, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"{name}: not done after {timeout:.0f} s", False
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no output"]
    if done.returncode:
        print("\n".join(lines[-60:]), flush=True)
    return f"{name}: {lines[-1].strip('= ')}", not done.returncode


def measure_models(run: GpuRun, device: str, deadline: Deadline, worker: Worker, budget: float) -> None:
    """Every model for which there is time, ours and eager, then again with the compiler, which takes a minute each."""
    rows: dict[tuple[str, str], gpu_models.ModelRow] = {}
    slowest = 60.0  # seconds of a model with the compiler: none is begun with less left
    for compile_too in (False, True):
        for number, model in enumerate(gpu_models.MODELS):
            left = deadline.left()
            if left < (slowest if compile_too else 0):
                run.left_out.append(titled(f"model {model.name}", compile_too))
                continue
            work = partial(worker.call, COMPILER_SECONDS, gpu_models.measure_model, number, device, compile_too, budget)
            for row in attempt(run, titled(f"model {model.name}", compile_too), work) or []:
                rows[row.model, row.direction] = row
                ratio = gpu_models.ratio(row, "eager")
                said = "no ratio" if ratio is None else f"{ratio:.2f}x eager"
                print(f"{row.model:<16} {row.direction:<14} {said}", *row.rejected.values(), flush=True)
            if compile_too:
                slowest = max(slowest, left - deadline.left())
            run.models[:] = rows.values()


def measure_all(run: GpuRun, options: argparse.Namespace, wanted: list[str], within: float) -> None:
    """Every wanted group, the most important first."""
    device, start = options.device, time.perf_counter()
    worker = Worker()
    rates = partial(worker.call, ROW_SECONDS, measure_machine, device, within / 100)
    if measured := attempt(run, "copy bandwidth and matrix rate", rates):
        run.copy_rates, run.matrix_rates = measured
    if "host" in wanted:
        host = partial(worker.call, ROW_SECONDS, gpu_host.measure_host, device, within / 50)
        run.add_host(attempt(run, "host time", host) or [])
    groups = [name for name in wanted if name not in OTHERS]
    rows_end = start + within * (0.65 if groups and "models" in wanted else 1)
    if groups:
        chosen = gpu_groups.cases(device, options.quick, groups)
        measure_rows(run, chosen, device, Deadline(rows_end), worker)
    if "models" in wanted:
        measure_models(run, device, Deadline(start + within), worker, within / 150)
    worker.stop()  # the counters want the device's memory for themselves
    if "counters" in wanted and device == "cuda":
        run.counters = attempt(run, "counters", partial(gpu_counters.measure_counters, within / 4)) or []


def names_of(text: str) -> list[str]:
    """The groups that ``--only`` names.

    Raises:
        argparse.ArgumentTypeError: there is no such group.
    """
    names = text.split(",")
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(NAMES)}, got {name!r}")
    return names


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few shapes in 2 minutes, in a separate record")
    parser.add_argument("--only", type=names_of, help=f"only these groups, separated by commas: {', '.join(NAMES)}")
    parser.add_argument(
        "--within", type=positive, help="seconds for the measurements: 400, 90 with --quick, 20 a group with --only"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--no-tests", action="store_true", help="only measure")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees, got none; --device cpu tries the program without one")
    start = time.perf_counter()
    wanted = options.only or [name for name in NAMES if not (name == "tests" and options.no_tests)]
    within = options.within or (20 * len(options.only) if options.only else 90 if options.quick else 400)
    run = GpuRun(machine(options.device))
    part = "".join("." + name for name in ("quick" * options.quick, "-".join(options.only or ())) if name)
    path = options.out / f"{slug(run.machine)}{part}.json"
    with writing(parser):
        check_writable(*written(path))
    print(machine_line(run.machine))
    for name, status in rk.backends().items():
        print(f"  {name:<10} {'yes' if status.available else 'no ':<4} {status.reason}")
    passed = True
    if "tests" in wanted:
        verdict = attempt(run, "tests", lambda: run_tests(options.device, max(0.75 * within, 60)))
        run.tests, passed = verdict or ("failed to run", False)
        print(run.tests, flush=True)
    measure_all(run, options, wanted, within)
    run.seconds = time.perf_counter() - start
    with writing(parser):
        run.save(path)
    attempt(run, "report", lambda: gpu_report.write(run, path))
    print(f"{run.seconds:.0f} s; written: {path} and beside it")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
