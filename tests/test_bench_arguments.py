"""The programs of benchmarks/ on wrong input: one line says what is wrong and what to do, and the exit code is 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_rows import row_of

from benchmarks import (
    compare,
    compiled,
    gpu,
    gpu_counts,
    gpu_report,
    model_matrix,
    model_speed,
    run,
    static_report,
    suite,
)
from rkl_kernels.bench import runtimes
from rkl_kernels.bench.machine import machine, machine_line, slug


def refused(main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that the program prints to stderr. It must exit with code 2."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("main", [run.main, suite.main])
@pytest.mark.parametrize("text", ["-1", "0", "two", "1.5"])
def test_threads(main: Callable[[list[str]], int], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(main, ["--threads", text], capsys)
    assert told.endswith(f"argument --threads: must be a whole number of at least 1, got {text!r}; give one such as 2")


def test_torch_is_not_held_to_instructions_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    told = refused(suite.main, ["--only", "fp32", "--no-models"], capsys)
    assert told.endswith(
        "ONEDNN_MAX_CPU_ISA must be set beside ATEN_CPU_CAPABILITY, got none; oneDNN reads it alone: AVX2"
    )


@pytest.mark.parametrize("limit", ["avx2", "default"])
def test_what_is_held_to_instructions_is_named_by_them(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = row_of().case
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    facts = machine()
    assert facts["held_to"] is None
    assert runtimes.serves(case)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", limit)
    held = machine()
    assert held["held_to"] == limit
    assert slug(held) != slug(facts) == slug(held).replace(f"-{limit}-", "-")
    assert " held to " in machine_line(held)
    assert not runtimes.serves(case)


@pytest.mark.parametrize(
    ("main", "name"),
    [
        (run.main, "--budget"),
        (suite.main, "--within"),
        (gpu.main, "--within"),
        (model_speed.main, "--budget"),
        (model_speed.main, "--within"),
        (compiled.main, "--budget"),
        (model_matrix.main, "--largest"),
    ],
)
@pytest.mark.parametrize("text", ["nan", "-1", "0", "inf", "long"])
def test_seconds(main: Callable[[list[str]], int], name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(main, [name, text], capsys)
    assert told.endswith(f"argument {name}: must be a positive number, got {text!r}; give one such as 1.5")


@pytest.mark.parametrize("text", ["no JSON", "[1, 2]", "{}", '{"machine": {}, "rows": []}', "\0"])
def test_what_is_no_run(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, right = tmp_path / "run.json", tmp_path / "right.json"
    path.write_text(text)
    suite.Run(dict.fromkeys(("device", "threads", "cores", "isa", "torch", "python"), 1), rows=[row_of()]).save(right)
    for main, arguments, name in (
        (compare.main, [str(path), str(right)], "NEW"),
        (compare.main, [str(right), str(path)], "OLD"),
        (gpu_report.main, [str(path)], "FILE.json"),
    ):
        told = refused(main, arguments, capsys)
        assert f"error: {name} must be the record of a run, got {path}: " in told
        assert told.endswith(" writes one")


def test_a_record_of_a_machine_that_is_not_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    suite.Run({}).save(path)
    assert "got " + str(path) in refused(compare.main, [str(path), str(path)], capsys)


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.json"
    assert f"NEW must be a file, got no run at {path}; `make bench` writes one" in refused(
        compare.main, [str(path)], capsys
    )
    assert f"got {path}: FileNotFoundError" in refused(gpu_report.main, [str(path)], capsys)
    assert "required: FILE.json" in refused(gpu_report.main, [], capsys)


def test_a_report_is_written_anew(tmp_path: Path) -> None:
    facts = dict.fromkeys(("device", "threads", "cores", "isa", "torch", "python"), 1)
    gpu_report.GpuRun(facts, tests="tests: 3 passed").save(tmp_path / "run.json")
    assert gpu_report.main([str(tmp_path / "run.json")]) == 0
    assert "Tests: tests: 3 passed." in (tmp_path / "run.md").read_text()


def test_the_counts_want_the_cuda_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    if hasattr(torch.ops.rkl, "cuda_depthwise_plan"):
        pytest.skip("the CUDA kernels are there")
    assert "error: needs the CUDA kernels, got an rkl_kernels without: " in refused(gpu_counts.main, [], capsys)


def test_a_part_of_the_models_does_not_replace_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    before = model_matrix.PAGE.read_text()
    told = refused(model_matrix.main, ["--only", "nothing of that name"], capsys)
    assert "error: --only must have --out" in told
    assert told.endswith("got --only 'nothing of that name' alone; add --out FILE")
    assert model_matrix.PAGE.read_text() == before


def test_some_models_do_not_replace_all(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(compiled.main, ["--only", "Mobile"], capsys)
    assert "error: --only must have --out, or some models would replace all, got 'Mobile' alone" in told


@pytest.mark.parametrize("main", [model_matrix.main, model_speed.main, compiled.main])
def test_models_that_are_not_there(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    told = refused(main, ["--only", "mobilnet_v2", "--out", str(out)], capsys)
    assert "--only must be part of a model's name, such as 'mobilenet_v2', got 'mobilnet_v2'" in told
    assert not out.exists(), "no empty record is left behind"


def test_operators_that_the_shapes_do_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(run.main, ["--operator", "separable", "--only", "kb-82,rep-"], capsys)
    assert "--operator and --direction must have rows, got separable and forward for kb-82,rep-; " in told
    told = refused(run.main, ["--operator", "trelu", "--direction", "data,weight"], capsys)
    assert "must have rows, got trelu and data,weight for all shapes; " in told


def test_busy_time_is_of_one_thread(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--threads must be 1 with --busy, got 2" in refused(run.main, ["--busy", "--threads", "2"], capsys)


def test_the_static_report_takes_no_arguments(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_report, "built_kernels", lambda: pytest.fail("the report is made, and written"))
    monkeypatch.setattr("sys.argv", ["static_report.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        static_report.main()
    assert exit.value.code == 0
    assert "usage: python -m benchmarks.static_report [-h]" in capsys.readouterr().out


def test_speeds_want_the_page_of_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").write_text("")
    monkeypatch.setattr(model_speed, "models", lambda page: iter([]) if page.is_file() else pytest.fail(str(page)))
    assert model_speed.main(["--out", str(tmp_path / "here")]) == 0, "from any folder"
    (record,) = (tmp_path / "here").glob("*-models.json")
    record.write_text(json.dumps([1]))
    told = refused(model_speed.main, ["--out", str(tmp_path / "here")], capsys)
    assert f"error: --out must be a folder whose record is one of models, got {record}: TypeError" in told
    monkeypatch.setattr(model_speed, "MATRIX", tmp_path / "none.md")
    assert f"got none at {tmp_path / 'none.md'}" in refused(model_speed.main, [], capsys)
