"""The record of models' speeds, after runs that are interrupted, that fail, or that take a single sample."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_rows import Net

from benchmarks import model_speed
from benchmarks.model_speed import Speed
from benchmarks.models import VARIANTS, ModelRow
from rkl_kernels.bench.timing import Timing


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(model_speed, "models", lambda page: iter([("Net", Net)]))
    return tmp_path


def run(out: Path, monkeypatch: pytest.MonkeyPatch, measured: Speed | BaseException, *arguments: str) -> dict[str, Any]:
    """The record after a run of one model, whose measurement returns or raises ``measured``."""

    def measure(*_: object) -> Speed:
        (record,) = out.glob("*.json")
        assert json.loads(record.read_text())["failed"] == {"Net": model_speed.CRASHED}, "for a crash in what follows"
        if isinstance(measured, BaseException):
            raise measured
        return measured

    monkeypatch.setattr(model_speed, "measure", measure)
    try:
        assert model_speed.main(["--out", str(out), *arguments]) == 0
    except KeyboardInterrupt:
        assert isinstance(measured, KeyboardInterrupt)
    (record,) = out.glob("*.json")
    return json.loads(record.read_text(), parse_constant=pytest.fail)


def test_an_interrupted_model_keeps_what_it_had(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(out, monkeypatch, KeyboardInterrupt())["failed"] == {}
    failed = run(out, monkeypatch, RuntimeError("no\nmore"))["failed"]
    assert failed == {"Net": "RuntimeError: no"}
    assert run(out, monkeypatch, KeyboardInterrupt())["failed"] == failed
    speed = Speed(8, 1.5, 0.1, 2.0, 0.1)
    assert run(out, monkeypatch, speed)["failed"] == {}
    kept = run(out, monkeypatch, KeyboardInterrupt())
    assert (kept["failed"], kept["speeds"]["Net"]["inference"]) == ({}, 1.5)
    assert "process ended" not in next(out.glob("*.md")).read_text()


def test_a_model_that_fails_has_no_row(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(out, monkeypatch, Speed(8, 1.5, 0.1, 2.0, 0.1))
    failed = run(out, monkeypatch, RuntimeError("ours nchw: wrong"))
    assert (failed["speeds"], failed["failed"]) == ({}, {"Net": "RuntimeError: ours nchw: wrong"})
    text = next(out.glob("*.md")).read_text()
    assert "| Net |" not in text
    assert "- Net: RuntimeError: ours nchw: wrong" in text


@pytest.mark.parametrize("rejected", ["ours nhwc", "eager nhwc"])
def test_a_ratio_wants_both_layouts_of_both(rejected: str) -> None:
    """The layout that was rejected may be the faster one."""
    row = ModelRow("Net", "inference", 2, 8, {name: Timing(1.0, 0.1, 9) for name in VARIANTS if name != rejected})
    row.rejected[rejected] = "wrong: logits off by 1 of the largest"
    with pytest.raises(RuntimeError, match=f"{rejected}: wrong: logits off by 1"):
        model_speed.ratio_and_noise(row)


def test_a_low_figure_is_measured_once_more_and_then_stands(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured until it is no longer low, it would be the highest of several."""
    low, high = Speed(8, 0.9, 0.1, 2.0, 0.1), Speed(8, 1.5, 0.1, 2.0, 0.1)

    def inference(speed: Speed, *arguments: str) -> float:
        return float(run(out, monkeypatch, speed, *arguments)["speeds"]["Net"]["inference"])

    assert inference(low) == 0.9
    assert inference(replace(low, inference=0.92), "--again", "--budget", "4") == 0.92
    assert inference(high, "--again", "--budget", "8") == 0.92
    assert inference(high) == 1.5, "a new first measurement"


def test_the_page_says_for_how_long_rows_were_timed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low = Speed(8, 0.9, 0.1, 2.0, 0.1)
    run(out, monkeypatch, low)
    page = next(out.glob("*.md"))
    assert "Seconds of timing in inference: 1 (rows without a star). " in page.read_text()
    assert "No row was measured a second time" in page.read_text()
    run(out, monkeypatch, low, "--again", "--budget", "0.5")
    assert "Seconds of timing in inference: 0.5 (rows with a star). " in page.read_text()
    told = model_speed.measured_again([low, replace(low, budget=1.0), replace(low, again=True, budget=4.0)])
    assert told[0].startswith(
        "Seconds of timing in inference: not recorded or 1 (rows without a star); 4 (rows with a star). "
    )


def test_the_committed_page_is_of_the_committed_record() -> None:
    records = list(model_speed.RESULTS.glob("*-models.json"))
    assert records
    for record in records:
        data = json.loads(record.read_text())
        speeds = {name: model_speed.speed_from_json(speed) for name, speed in data["speeds"].items()}
        assert record.with_suffix(".md").read_text() == model_speed.page(data["machine"], speeds, data["failed"])


def test_a_row_says_if_its_gradients_were_not_compared(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = Speed(8, 1.5, 0.1, 2.0, 0.1)
    run(out, monkeypatch, speed)
    (page,) = out.glob("*.md")
    assert "gradients" not in page.read_text()
    note = "gradients not compared, as PyTorch's own two layouts differ by 0.6 of a gradient's norm"
    assert run(out, monkeypatch, replace(speed, note=note))["speeds"]["Net"]["note"] == note
    assert f"by a wider bound, or not at all:\n\n- Net: {note}\n" in page.read_text()
    rows = [ModelRow("Net", name, 2, 8, dict.fromkeys(VARIANTS, Timing(1.0, 0.1, 9))) for name in ("inference", "step")]
    rows[1].note = note
    monkeypatch.undo()
    monkeypatch.setattr(model_speed, "measure_model", lambda *_: rows)
    assert model_speed.measure("Net", Net, 1.0).note == note


def test_an_error_without_words_is_told(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(out, monkeypatch, AssertionError())["failed"] == {"Net": "AssertionError: without a message"}


def test_a_noise_that_is_not_known(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = Speed(8, 1.5, math.inf, 2.0, 0.1)
    assert run(out, monkeypatch, speed)["speeds"]["Net"]["inference_noise"] is None
    (record,) = out.glob("*.json")
    assert model_speed.Record(record, model_speed.machine()).speeds == {"Net": replace(speed, budget=1.0)}
    text = record.with_suffix(".md").read_text()
    assert "| Net | 8 | 1.50 ± ? | 2.00 ± 0.20 |" in text
    assert "unknown at most" in text


def test_rows_of_other_versions_stay_apart(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = Speed(8, 1.5, 0.1, 2.0, 0.1)
    kept = run(out, monkeypatch, speed)
    (record,) = out.glob("*.json")
    record.write_text(text := json.dumps(kept | {"machine": kept["machine"] | {"torch": "2.11.0"}}))
    with pytest.raises(SystemExit):
        model_speed.main(["--out", str(out)])
    assert record.read_text() == text, "the page would say of the kept rows that today's torch made them"
    told = capsys.readouterr().err
    assert f"error: --out must be a folder whose record is of this machine and its versions, got {record}: " in told
    assert "torch 2.11.0" in told
