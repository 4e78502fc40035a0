"""The program of ``make gpu``, tried without a GPU: every step runs, and a step that fails does not end the others."""

from __future__ import annotations

import json
import os
import subprocess
import time

import pytest
import torch
from bench_rows import Spoilt
from torch import nn

import rkl_kernels as rk
from benchmarks import gpu, gpu_counters, gpu_groups, gpu_host, gpu_models, gpu_report, gpu_rows, report
from benchmarks.models import Model, ModelRow
from benchmarks.worker import Worker
from rkl_kernels.bench import Case
from rkl_kernels.bench.row import Row
from rkl_kernels.bench.timing import Timing


def timing(seconds: float) -> Timing:
    return Timing(seconds, 0, 3)


def test_whole_program_on_tiny_shapes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_host, "measure_host", os.abort)  # takes no arguments, so it raises in the worker
    monkeypatch.setattr(gpu_models, "MODELS", ())
    monkeypatch.setattr(gpu_groups, "QUICK", ("rkl-4-k3",))
    monkeypatch.setattr(gpu_rows, "MOST_BUDGET", 0.01)
    assert gpu.main(["--device", "cpu", "--quick", "--no-tests", "--within", "100", "--out", str(tmp_path)]) == 0
    (results,) = tmp_path.glob("*.json")
    assert results.name.endswith(".quick.json"), "it does not replace the record of all shapes"
    assert results.with_suffix(".png").stat().st_size > 10_000
    data = json.loads(results.read_text())
    assert len(data["rows"]) + len(data["left_out"]) == len(gpu_groups.cases("cpu", True))
    assert all(row["times"] for row in data["rows"])
    text = results.with_suffix(".md").read_text()
    assert "forward, data: x the best rival, NHWC, lowest | >= 1.00 |" in text
    assert "failed: host time" in capsys.readouterr().out


def test_a_row_that_fails_is_in_the_record(tmp_path, monkeypatch):
    """It was printed alone, and then neither a figure nor a reason stood for it on the page."""
    monkeypatch.setattr(gpu_rows, "measure_row", os.abort)  # takes no arguments, so it raises in the worker
    monkeypatch.setattr(gpu_groups, "QUICK", ("mnv1-112",))
    monkeypatch.setattr(gpu_models, "MODELS", (Model("small", _small_net, 2, 16),))
    monkeypatch.setattr(gpu_models, "measure_model", os.abort)
    arguments = ["--device", "cpu", "--quick", "--only", "separable,models", "--within", "1000", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 0
    (results,) = tmp_path.glob("*.json")
    failed = gpu_report.GpuRun.load(results).failed
    row = "separable forward bf16 mnv1-112"
    assert list(failed) == [row, f"{row}, with torch.compile", "model small", "model small, with torch.compile"]
    assert all(why.startswith("fails: TypeError: ") for why in failed.values())
    assert f"| {row} | all | fails: TypeError: " in results.with_suffix(".md").read_text()


def test_the_compiler_that_time_does_not_reach_is_named():
    run, past = gpu_report.GpuRun({}), gpu_rows.Deadline(0.0)
    (case,) = (case for case in gpu_groups.cases("cuda", only=["separable"]) if case.name == "mnv1-112")
    gpu_rows.measure_rows(run, [case], "cpu", past, Worker())
    assert run.left_out == [case.id, f"{case.id}, with torch.compile"]
    run.left_out.clear()
    gpu.measure_models(run, "cpu", past, Worker(), 0.01)
    names = [f"model {model.name}" for model in gpu_models.MODELS]
    assert run.left_out == names + [f"{name}, with torch.compile" for name in names]


def test_a_row_of_ours_that_fails_is_counted_apart():
    """The means are over the others alone, and did not say so."""

    def row(**times: float) -> Row:
        case = Case("depthwise", 4, 16, 32, 32, padding=1, dtype="bf16")
        return Row(case, timing(1.0), 1e30, {name.replace("_", " "): timing(one) for name, one in times.items()})

    rows = [row(ours_nhwc=1.0, eager_nhwc=2.0), row(eager_nhwc=2.0)]
    group = gpu_groups.GROUPS[1]
    figures = ["100%", "2.00", "2.00", "0"]
    assert gpu_report.summary_lines(group, rows) == [[group.name, "forward", "2 (1 without a ratio)", *figures]]
    assert gpu_report.summary_lines(group, rows[1:])[0][2:] == ["1 (1 without a ratio)", "-", "-", "-", "0"]
    assert report.summary_lines(rows)[0][:2] == ["depthwise forward bf16", "2 (1 without a ratio)"]


def test_one_group(tmp_path):
    assert gpu.main(["--device", "cpu", "--only", "host", "--within", "1", "--out", str(tmp_path)]) == 0
    (results,) = tmp_path.glob("*.host.json")
    data = json.loads(results.read_text())
    assert len(data["host"]) == 9
    assert all(row["ratio"] > 0 for row in data["host"])
    text = results.with_suffix(".md").read_text()
    assert "| depthwise_conv2d (F.conv2d) | backward |" in text
    assert "Roofline" not in text


@pytest.mark.parametrize(
    ("outcome", "code", "verdict"),
    [
        (0, 0, "tests: 3 passed"),
        (1, 1, "tests: 3 passed"),
        (subprocess.TimeoutExpired("pytest", 60), 1, "tests: not done after 60 s"),
        (OSError("no such file"), 1, "failed to run"),
    ],
    ids=["passed", "failed", "hung", "not run"],
)
def test_failed_tests_are_the_exit_code_once_all_is_written(outcome, code, verdict, tmp_path, monkeypatch):
    def run(command, **_):
        if isinstance(outcome, Exception):
            raise outcome
        return subprocess.CompletedProcess(command, outcome, "== 3 passed ==\n", "")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "measure_all", lambda *_: None)
    assert gpu.main(["--device", "cpu", "--only", "tests", "--within", "1", "--out", str(tmp_path)]) == code
    (results,) = tmp_path.glob("*.tests.json")
    assert json.loads(results.read_text())["tests"] == verdict
    assert f"Tests: {verdict}." in results.with_suffix(".md").read_text()


def test_an_unknown_group_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--only", "depthwise,nothing"])
    assert "got 'nothing'" in capsys.readouterr().err


def test_sixteen_bits_first_and_every_case_in_a_group():
    cases = gpu_groups.cases("cuda")
    assert len(set(cases)) == len(cases) == len(list(gpu_groups._all("cuda")))
    first = next(i for i, case in enumerate(cases) if case.dtype == "fp32")
    assert {case.operator for case in cases[:first]} == {"trelu", "depthwise", "separable"}
    assert {case.name for case in cases[first:] if case.dtype == "bf16"} <= {"kb-83", "kb-85"}  # not square
    assert cases[-1].tf32
    names = {case.name for case in gpu_groups.cases("cuda", only=["kernelbench"])}
    assert names == {"kb-82", "kb-83", "kb-84", "kb-85", "kb-86"}


def test_a_bar_is_held_against_what_was_found():
    def row(name: str, ours: float, rival: float, direction: str = "forward", dtype: str = "bf16") -> Row:
        case = Case("depthwise", 4, 16, 32, 32, padding=1, dtype=dtype, direction=direction, name=name)
        times = {"ours nhwc": ours, "ours nchw": 3.0, "eager nchw": 9.0, "eager nhwc": rival}
        return Row(case, timing(1.0), 1e30, {key: timing(seconds) for key, seconds in times.items()})

    rows = [row("a", 1.0, 4.0), row("b", 2.0, 1.0)]
    groups = {group.name: group for group in gpu_groups.GROUPS}
    lines = {line[0]: line[1:] for line in gpu_report.bar_lines(groups["depthwise"], rows)}
    assert lines["forward, data: x the best rival, NHWC, geometric mean"] == [">= 1.50", "1.41", "**no**"]
    assert lines["forward, data: x the best rival, NHWC, lowest"] == [">= 1.00", "0.50", "**no**"]
    (share,) = (line for name, line in lines.items() if "of the floor" in name)
    assert share == [">= 85%", "71%", "**no**"]
    assert gpu_report.summary_lines(groups["depthwise"], rows) == [
        ["depthwise", "forward", "2", "71%", "1.41", "0.50", "1"]
    ]
    nearly = gpu_report.summary_lines(groups["depthwise"], [row("a", 1.0, 0.997)])
    assert nearly == [["depthwise", "forward", "1", "100%", "1.00", "1.00", "1"]], "0.997 is below 1"
    ((_, *nchw),) = gpu_report.bar_lines(groups["nchw"], rows)
    assert nchw == [">= 1.00", "3.00", "yes"]
    published = gpu_report.bar_lines(groups["kernelbench"], [row("kb-82", 1.0, 1.0, dtype="fp32")])[-1]
    assert published == ["kb-82, fp32, NCHW: ms (best published, H100)", "<= 1.225", "3000.000", "**no**"]
    assert gpu_report.bar_lines(groups["gradients"], rows)[0][-2:] == ["-", "-"]  # nothing found


def _small_net() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def test_a_model_is_timed_converted_and_not(monkeypatch):
    monkeypatch.setattr(gpu_models, "MODELS", (Model("small", _small_net, 2, 16),))
    rows = gpu_models.measure_model(0, "cpu", compile_too=False, budget=0.01)
    assert [row.direction for row in rows] == list(gpu_models.DIRECTIONS)
    assert all(row.times.keys() == {"ours", "eager"} and not row.rejected for row in rows)


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_a_wrong_model_is_not_timed(factor, monkeypatch):
    monkeypatch.setattr(gpu_models, "MODELS", (Model("small", _small_net, 2, 16),))
    monkeypatch.setattr(rk, "fuse_for_inference", lambda net: Spoilt(net, factor))
    Spoilt.calls = 0
    rows = gpu_models.measure_model(0, "cpu", compile_too=False, budget=0.01)
    assert Spoilt.calls == 1, "the check alone"
    for row in rows:
        assert row.times.keys() == {"eager"}
        assert row.rejected["ours"].startswith("fails: ValueError: logits off by ")


def test_every_head_of_a_model_counts(monkeypatch):
    """A NaN too is found behind heads that are right."""
    seen = []

    def heads(outputs):
        seen.append(outputs)
        return [outputs, outputs * (float("nan") if len(seen) == 3 else 1.0)]  # eager's inference and step, then ours

    monkeypatch.setattr(gpu_models, "MODELS", (Model("small", _small_net, 2, 16),))
    monkeypatch.setattr(gpu_models, "_heads", heads)
    row, _ = gpu_models.measure_model(0, "cpu", compile_too=False, budget=0.01)
    assert row.rejected == {"ours": "fails: ValueError: logits off by nan of the largest"}


def test_a_model_that_fails_without_words_is_told(monkeypatch):
    def fuse(net):
        raise AssertionError

    monkeypatch.setattr(gpu_models, "MODELS", (Model("small", _small_net, 2, 16),))
    monkeypatch.setattr(rk, "fuse_for_inference", fuse)
    for row in gpu_models.measure_model(0, "cpu", compile_too=False, budget=0.01):
        assert row.times.keys() == {"eager"}
        assert row.rejected == {"ours": "fails: AssertionError: without a message"}


def test_a_model_that_is_not_there_says_so():
    def build() -> nn.Module:
        raise ImportError("no such model")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_models, "MODELS", (Model("none", build, 2, 16),))
        with pytest.raises(ImportError, match="no such model"):
            gpu_models.measure_model(0, "cpu", compile_too=False, budget=0.01)


def test_model_lines_name_what_is_below_its_bar():
    times = {"ours": timing(2.0), "eager": timing(3.0), "compile": timing(1.0)}
    row = ModelRow("ResNet-KL", "training step", 2, 32, times, {"ours": 8_000_000, "eager": 10_000_000})
    (line,) = gpu_report.model_lines([row])
    assert line[-6:] == ["1.50 (>= 1.5)", "0.50", "8", "10", "-", "0.80 (<= 0.7, **no**)"]


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","smsp__inst_executed.sum"
"","","ns","inst"
"0","at::cuda::spin_kernel(long)","1,000","10"
"1","void rkl::conv<3>(int)","59,500","2,500,000"
"2","at::cuda::spin_kernel(long)","1,000","10"
"3","void rkl::grad<3>(int)","n/a","7,000,000"
"""


def test_counters_are_put_to_their_cases():
    first, second = gpu_counters.parse(NCU, ["forward", "backward"])
    assert (first["case"], first["kernel"], first["us"], first["M instructions"]) == (
        "forward",
        "rkl::conv<3>",
        59.5,
        2.5,
    )
    assert (second["case"], second["us"], second["registers"]) == ("backward", None, None)
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        gpu_counters.parse("==ERROR== ERR_NVGPUCTRPERM - no permission", [])
    assert len(list(gpu_counters.cases())) == 20


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
