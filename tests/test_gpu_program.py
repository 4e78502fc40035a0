"""``make gpu``'s program, tried without a GPU: every step runs, and failures of one do not end the others."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from benchmarks import gpu
from benchmarks.worker import Worker
from rkl_kernels import fusion
from rkl_kernels.bench import Case
from rkl_kernels.bench.row import Row
from rkl_kernels.bench.timing import Timing


def test_whole_program_on_tiny_shapes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "measure_step", os.abort)  # wants no arguments: raises in the worker
    monkeypatch.setattr(gpu, "QUICK", ("rkl-4-k3",))
    assert gpu.main(["--device", "cpu", "--quick", "--no-tests", "--within", "15", "--out", str(tmp_path)]) == 0
    (results,) = (path for path in tmp_path.glob("*.json") if not path.name.endswith(".planner.json"))
    assert results.with_suffix(".md").exists()
    assert results.with_suffix(".png").stat().st_size > 10_000
    data = json.loads(results.read_text())
    assert len(data["rows"]) + len(data["left_out"]) == len(list(gpu.cases("cpu", True)))
    assert all(row["times"] for row in data["rows"])
    assert "failed: ResNet-KL training step" in capsys.readouterr().out


def test_planner_table_names_the_faster_path():
    def row(direction: str, fused: float, composed: float) -> Row:
        case = Case("separable", 4, 16, 8, 8, out_channels=32, padding=1, dtype="bf16", direction=direction)
        names = {"triton-fused": fused, "triton-composed": composed, "cuda": 3.0, "triton": min(fused, composed)}
        times = {f"ours-{name} nhwc": Timing(seconds, 0, 3) for name, seconds in names.items()}
        return Row(case, Timing(1, 0, 3), 1.0, times)

    table = gpu.planner_table([row("forward", 1.0, 2.0), row("backward", 2.0, 1.0)])
    assert sorted(table.values()) == ["composed", "fused", "triton"]
    assert table["separable_conv2d"] == "triton"
    forward = fusion.Separable(4, 16, 32, 64, 64, 9, 2, backward=False)
    assert table[forward.key] == "fused"


def test_a_gpu_is_asked_for_where_there_is_none(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as exit_:
        gpu.main([])
    assert exit_.value.code == 2
    assert "--device cpu" in capsys.readouterr().err


def test_worker_outlives_what_it_calls():
    worker = Worker()
    assert worker.call(60, max, 2, 3) == 3
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        worker.call(60, divmod, 1, 0)
    with pytest.raises(RuntimeError, match="ended with code -6"):
        worker.call(60, os.abort)
    assert worker.call(60, max, 3, 4) == 4
    with pytest.raises(TimeoutError, match="no answer after 0 s"):
        worker.call(0.2, time.sleep, 60)
    assert worker.call(60, max, 4, 5) == 5
    worker.stop()
