"""A file that cannot be written ends a command in one line, before the work if that can be known. Nothing is left half
written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_rows import row_of
from matplotlib.figure import Figure
from test_bench_records import run_of

from benchmarks import compiled, gpu, gpu_report, model_matrix, model_speed, numerics, report, suite
from rkl.config import Config, to_plain
from rkl.deploy import exit_report, export
from rkl.paper import cells, tables
from rkl.training import files, metrics, run_log
from rkl.training import report as run_report
from rkl.training.files import UnwritableError
from rkl.training.train import train


def spoilt(*_: object, **__: object) -> Any:
    pytest.fail("the work began")


def refused(main: Callable[[list[str]], object], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line that a program prints when it refuses."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def in_the_way(tmp_path: Path) -> Path:
    """A file where a folder is wanted."""
    path = tmp_path / "file"
    path.write_text("mine")
    return path


@pytest.fixture
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "perform", spoilt)
    monkeypatch.setattr(gpu, "measure_all", spoilt)
    monkeypatch.setattr(model_matrix, "candidates", spoilt)
    monkeypatch.setattr(model_speed, "models", spoilt)
    monkeypatch.setattr(compiled, "measure", spoilt)
    monkeypatch.setattr(numerics, "_in_own_process", spoilt)


@pytest.mark.usefixtures("_no_work")
def test_a_benchmark_that_has_nowhere_to_write_does_not_begin(
    in_the_way: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = in_the_way / "deep"
    monkeypatch.setattr(numerics, "PAGE", out / "page.md")
    monkeypatch.setattr(sys, "argv", ["numerics"])
    for main, arguments in (
        (suite.main, ["--out", str(out)]),
        (gpu.main, ["--device", "cpu", "--no-tests", "--out", str(out)]),
        (model_matrix.main, ["--out", str(out / "page.md")]),
        (model_speed.main, ["--out", str(out)]),
        (compiled.main, ["--out", str(out)]),
        (lambda _: numerics.main(), []),
    ):
        told = refused(main, arguments, capsys)
        assert f"error: {out}/" in told
        assert told.endswith(": must be writable, got: Not a directory; mend that and run the command again")
    assert in_the_way.read_text() == "mine"


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize("ending", [".json", ".md", ".png"])
def test_a_folder_of_a_records_name(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = suite.record(tmp_path, "", again=False).with_suffix(ending)
    taken.mkdir()
    for main, arguments in ((suite.main, []), (gpu.main, ["--device", "cpu", "--no-tests"])):
        told = refused(main, [*arguments, "--out", str(tmp_path)], capsys)
        assert f"error: {taken}: must be writable, got: Is a directory;" in told
    assert list(tmp_path.iterdir()) == [taken]


def test_a_page_that_cannot_be_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    run = run_of(row_of(ours_nchw=2.0, eager_nchw=4.0))
    gpu_report.GpuRun(run.machine, tests="tests: 3 passed").save(path)
    path.with_suffix(".md").mkdir()
    assert f"error: {path.with_suffix('.md')}: must be writable" in refused(gpu_report.main, [str(path)], capsys)


def test_a_plot_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Figure, path: Path, **_: object) -> None:
        path.write_text("half of it")
        raise OSError(28, "No space left on device")

    path = tmp_path / "run.png"
    path.write_text("before")
    monkeypatch.setattr(Figure, "savefig", full)
    for draw in (
        lambda: report.plot(run_of(row_of(ours_nchw=2.0, eager_nchw=4.0)), path),
        lambda: run_report.plot_confusion([[1, 0], [0, 1]], ["a", "b"], "title", path),
    ):
        with pytest.raises(UnwritableError, match=r"run.png: must be writable, got: No space left on device"):
            draw()
        assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_records_are_json_to_every_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation loss may be nan while training goes on. JSON has no nan, so null is written and read as nan."""
    measured = metrics.exit_metrics
    monkeypatch.setattr(metrics, "exit_metrics", lambda *values: measured(*values) | {"nll": math.nan})
    small = {"width": 4, "image_size": 8, "train_size": 60, "test_size": 20, "batch_size": 32}
    out = tmp_path / "run"
    assert train(Config(out, epochs=1, exits=False, **small)) == out
    texts = [(out / "metrics.json").read_text(), *(out / "log.jsonl").read_text().splitlines()]
    for text in texts:
        assert json.loads(text, parse_constant=spoilt)
        assert '"nll": null' in text
    record, (row,) = run_report.read_metrics(out), files.read_lines(out / "log.jsonl")
    for values in (record["test"][-1], record["val"][-1], row["val"][-1]):
        assert math.isnan(values["nll"])
        assert math.isfinite(values["accuracy"])
    assert record["thresholds"] is None
    assert " nan |" in run_report.write_report(out).read_text()


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("before")
    files.check_writable(tmp_path / "old", tmp_path / "new" / "file")
    assert (tmp_path / "old").read_text() == "before"
    assert not list((tmp_path / "new").iterdir())


def test_a_page_is_in_utf8_in_any_locale(tmp_path: Path) -> None:
    program = "from rkl.training.files import *; write_text(Path('page'), chr(0x2020))"
    ascii_alone = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    source = {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=ascii_alone | source, check=True)
    assert (tmp_path / "page").read_text(encoding="utf-8") == "†"


@pytest.mark.parametrize("setting", [{"out": Path("\udcff")}, {"data": "folder:\udcff"}, {"weights": Path("a/\udcff")}])
def test_a_name_that_no_record_can_hold_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(setting))} must be a name in UTF-8, got .*\udcff"):
        Config(**setting)


def test_early_exits_and_exports_are_refused_first(tmp_path: Path, in_the_way: Path) -> None:
    model = SimpleNamespace(deploy=spoilt, eval=lambda: SimpleNamespace(requires_grad_=lambda _: None))
    run: Any = SimpleNamespace(folder=tmp_path, model=model, config=Config(), device="cpu")
    with pytest.raises(UnwritableError, match=r"file/model.onnx: must be writable, got: "):
        export.export(run, "onnx", in_the_way)
    (tmp_path / "early_exit.json").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exit_report, "ResNetKL", SimpleNamespace)
        with pytest.raises(UnwritableError, match=r"early_exit.json: must be writable, got: Is a directory"):
            exit_report.evaluate_early_exit(run)


def test_a_page_of_experiments_is_refused_before_latencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.md").mkdir()
    monkeypatch.setattr(tables, "load_results", lambda _: [])
    monkeypatch.setattr(tables, "measure", spoilt)
    with pytest.raises(UnwritableError, match=r"report.md: must be writable, got: Is a directory"):
        tables.write(tmp_path)


def test_a_cell_whose_folder_cannot_be_made_is_told(in_the_way: Path) -> None:
    sent: list[str] = []
    cells.train_cell(to_plain(Config(out=in_the_way)), 1, SimpleNamespace(send=sent.append))
    assert sent == [f"{in_the_way}/output.txt: must be writable, got: File exists; mend that and run the command again"]


def test_a_file_in_the_place_of_events_ends_a_run_that_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("mine")
    log = run_log.RunLog(Config(out=tmp_path), resume=False)
    with pytest.raises(UnwritableError, match=r"tensorboard: must be writable, got: "), log.opened(0, writing=True):
        spoilt()
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def test_a_report_whose_plots_have_no_folder(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("mine")
    with pytest.raises(UnwritableError, match=r"plots/confusion.png: must be writable, got: "):
        run_report.plot_confusion([[1]], ["a"], "title", tmp_path / "plots" / "confusion.png")
