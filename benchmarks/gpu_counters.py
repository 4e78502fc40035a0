"""The hardware's counters for twenty calls, by Nsight Compute (``ncu``) where it is installed.

ncu runs ``python -m benchmarks.gpu_counters``: each case once, after a kernel that only marks the case's beginning.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rkl_kernels.bench import Case
from rkl_kernels.bench.rivals import ours

from .shapes import select

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    "depthwise forward mnv1-112 bf16 nhwc", "depthwise forward xcep-19 bf16 nhwc",
    "depthwise forward mnv2-112s2 bf16 nhwc", "depthwise forward mnas-14 bf16 nhwc",
    "depthwise forward cnx-56 bf16 nhwc", "depthwise forward rkl-4-k3 bf16 nhwc",
    "depthwise backward mnv1-112 bf16 nhwc", "depthwise backward cnx-56 bf16 nhwc",
    "separable forward mnv1-112 bf16 nhwc", "trelu forward kb-82 bf16 nhwc",
    # The rows farthest below their group's bar.
    "depthwise forward one-112 bf16 nhwc", "depthwise forward dlab-33-d12 bf16 nhwc",
    "depthwise forward dlab-33-d18 bf16 nhwc", "depthwise forward rep-32-k13 bf16 nhwc",
    "depthwise forward rep-32-k31 bf16 nhwc", "depthwise forward mnas-14 fp32 nhwc",
    "depthwise forward cnx-56 fp32 nhwc", "depthwise forward rep-32-k13 fp32 nhwc",
    "depthwise forward rkl-4-k3s2 bf16 nchw", "separable forward xcep-147 bf16 nhwc",
)  # fmt: skip
# A column of the table, ncu's metric, and what to divide it by. ncu stops at a name that it does not know. It knows all
# of these on sm_90.
METRICS = {
    "us": ("gpu__time_duration.sum", 1e3),
    "MB read": ("dram__bytes_read.sum", 1e6),
    "MB written": ("dram__bytes_write.sum", 1e6),
    "% memory": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "% L1": ("l1tex__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "M wavefronts": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", 1e6),
    "M conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", 1e6),
    "M instructions": ("smsp__inst_executed.sum", 1e6),
    "% issue": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 1),
    "% warps": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
    "registers": ("launch__registers_per_thread", 1),
    "blocks": ("launch__grid_size", 1),
}
MARK = "spin_kernel"  # the kernel of torch.cuda._sleep


def cases() -> Iterator[tuple[Case, str]]:
    """Each case and its layout."""
    for text in CASES:
        operator, direction, name, dtype, layout = text.split()
        shape = next(shape for shape in select(name) if shape.id == name)
        yield shape.case(operator, direction, dtype, "cuda"), layout


def run_cases() -> None:
    for case, layout in cases():
        run = ours(layout, "cuda").prepare(case, "cuda")
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def parse(output: str, ids: list[str]) -> list[dict[str, Any]]:
    """One row a kernel, from ncu's raw CSV, where a marking kernel begins each case.

    Raises:
        RuntimeError: ncu printed no table.
    """
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError("ncu printed no table: " + " ".join(line for line in lines if "==ERROR==" in line)[:300])
    rows, number = [], -1
    for record in csv.DictReader(lines[start:]):
        name = record["Kernel Name"]
        if not name:  # the line with the units
            continue
        if MARK in name:
            number += 1
            continue
        figures = {column: _figure(record.get(metric, ""), scale) for column, (metric, scale) in METRICS.items()}
        rows.append({"case": ids[number], "kernel": name.split("(")[0].replace("void ", ""), **figures})
    return rows


def _figure(text: str, scale: float) -> float | None:
    try:
        return round(float(text.replace(",", "")) / scale, 2)
    except ValueError:
        return None


def measure_counters(seconds: float) -> list[dict[str, Any]]:
    """The table's rows.

    Raises:
        RuntimeError: ncu is not installed, or may not read the counters here.
    """
    ncu = shutil.which("ncu")
    if not ncu:
        raise RuntimeError("no ncu on PATH")
    metrics = ",".join(metric for metric, _ in METRICS.values())
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"]
    command += ["--metrics", metrics, sys.executable, "-m", "benchmarks.gpu_counters"]
    done = subprocess.run(command, cwd=ROOT, timeout=seconds, capture_output=True, text=True)
    return parse(done.stdout + done.stderr, list(CASES))


if __name__ == "__main__":
    run_cases()
