"""The record of models' speeds, after runs that are interrupted, that fail, or that take a single sample."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from bench_rows import Net

from benchmarks import model_speed
from benchmarks.model_speed import Speed


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


def test_an_error_without_words_is_told(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(out, monkeypatch, AssertionError())["failed"] == {"Net": "AssertionError: without a message"}


def test_a_noise_that_is_not_known(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = Speed(8, 1.5, math.inf, 2.0, 0.1)
    assert run(out, monkeypatch, speed)["speeds"]["Net"]["inference_noise"] is None
    (record,) = out.glob("*.json")
    assert model_speed.Record(record, model_speed.machine()).speeds == {"Net": speed}
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
