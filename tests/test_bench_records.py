"""What a run of the benchmarks leaves behind: records that are written, read, compared and measured again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_rows import TINY, Net, row_of

from benchmarks import compare, models, report, suite
from rkl_kernels.bench.row import Row, from_json, to_json
from rkl_kernels.bench.timing import Timing


def run_of(*rows: Row, noise: float = 0.05) -> suite.Run:
    facts = {"device": "A CPU", "cores": 2, "threads": 2, "isa": "AVX2", "torch": "2.13", "python": "3.11"}
    model = models.ModelRow(
        "Net", "training step", 2, 32, {"ours nhwc": Timing(1, 0, 9), "eager nchw": Timing(2, 0, 9)}
    )
    model.memory = {"ours nhwc": 6_000_000, "eager nchw": 12_000_000}
    rates = {"copy_rates": {1_000_000: 2e10, 128_000_000: 1e10}, "matrix_rates": {"fp32": 1e11, "bf16": 2e11}}
    return suite.Run(facts, **rates, rows=list(rows), models=[model], noise=noise)  # type: ignore[arg-type]


def test_compare_names_what_got_slower_than_the_noise(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    names = ("steady", "noisy", "slowed", "slower machine", "lost")
    cases = {name: replace(TINY, name=name) for name in names}
    old = run_of(*(row_of(case, ours_nchw=2.0, eager_nchw=4.0) for case in cases.values()))
    new = run_of(
        row_of(cases["steady"], ours_nchw=2.08, eager_nchw=4.0),
        row_of(cases["noisy"], ours_nchw=2.6, noise=0.1, eager_nchw=4.0),
        row_of(cases["slowed"], ours_nchw=2.6, eager_nchw=4.0),
        row_of(cases["slower machine"], copy=2.0, ours_nchw=4.0, eager_nchw=8.0),
        row_of(cases["lost"], eager_nchw=4.0),
    )
    old.save(tmp_path / "old.json")
    new.save(tmp_path / "new.json")
    assert compare.main([str(tmp_path / "new.json"), str(tmp_path / "old.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "slower: depthwise forward fp32 slowed, ours nchw: 1.30x the time, noise up to 1.05x"
    assert lines[1] == "lost: depthwise forward fp32 lost, ours nchw: was timed, now fails or is wrong"
    assert lines[2] == "5 rows compared: 1 slower, 0 faster, 1 lost"
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "old.json")]) == 0
    with pytest.raises(SystemExit) as exit:
        compare.main([str(tmp_path / "none.json")])
    assert exit.value.code == 2


def test_a_run_is_written_and_read_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    row = row_of(ours_nchw=4.0, eager_nchw=12.0, noise=0.1)
    row.rejected["eager nhwc"] = "wrong: off by 1e+17 of the largest value"
    assert from_json(json.loads(json.dumps(to_json(row)))) == row
    run = run_of(row, row_of(replace(TINY, operator="trelu", dtype="bf16", direction="backward"), ours_nhwc=1.0))
    path = tmp_path / "run.json"
    run.save(path)
    assert suite.Run.load(path) == run
    report.write(run, path)
    text = path.with_suffix(".md").read_text()
    assert "| depthwise forward fp32 | 1 | 3.00 | - | 3.00 | 3.00 (tiny) | 0 | 25% | - |" in text
    assert "off by 1e+17" in text
    assert "| 2.00 |" in text, "the model's ratio"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".md", ".png"], "no draft is left behind"


def test_rows_measured_again_stand_in_their_places(tmp_path: Path) -> None:
    first, other = row_of(ours_nchw=4.0, eager_nchw=12.0), row_of(replace(TINY, direction="backward"), ours_nhwc=1.0)
    run = replace(run_of(first, other, noise=0.1), left_out=["depthwise forward bf16 tiny"])
    missed = row_of(replace(TINY, dtype="bf16"), ours_nchw=1.0)
    later = run_of(row_of(ours_nchw=3.0, eager_nchw=12.0), missed, noise=0.2)
    merged = run.with_rows_of(later, "depthwise forward")
    assert merged.rows == [later.rows[0], other, missed]
    assert (merged.noise, merged.left_out, merged.again) == (0.2, [], ["depthwise forward"])
    assert merged.with_rows_of(later, "depthwise forward") == merged
    merged.save(tmp_path / "run.json")
    assert suite.Run.load(tmp_path / "run.json") == merged
    assert "Rows with `depthwise forward` in their name are of later runs" in report.markdown(merged, "run.png")


def test_again_wants_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--only", "trelu forward fp32"], []):
        with pytest.raises(SystemExit):
            suite.main(["--again", "--out", str(tmp_path), *arguments])
        assert "--again must have --only and a record to go into" in capsys.readouterr().err


def test_the_suite_in_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing() -> torch.nn.Module:
        raise ImportError("No module named 'timm'")

    monkeypatch.setattr(models, "MODELS", (models.Model("Net", Net, 2, 8), models.Model("Missing", missing, 2, 8)))
    monkeypatch.setattr(suite, "MOST_BUDGET", 0.02)
    monkeypatch.setattr(suite, "COPY_SIZES", (1_000_000,))
    tiny = [replace(TINY, direction=direction) for direction in ("forward", "backward")]
    run = suite.perform(tiny, with_models=True, within=180.0)
    assert [row.case for row in run.rows] == tiny
    assert not run.left_out
    assert all(row.over_best() for row in run.rows)
    assert run.copy_rates[1_000_000] > 0
    assert [(row.model, row.direction) for row in run.models][:2] == [("Net", "inference"), ("Net", "training step")]
    assert run.models[2].rejected == {"all": "fails: ImportError: No module named 'timm'"}
    run.save(tmp_path / "run.json")
    report.write(suite.Run.load(tmp_path / "run.json"), tmp_path / "run.json")
    assert "| Net | training step | 2 x 8² |" in (tmp_path / "run.md").read_text()
    assert suite.perform(tiny, with_models=False, within=0.0).left_out == [case.id for case in tiny]
    assert suite.noise_between([(row_of(ours_nchw=2.0), row_of(ours_nchw=2.5))]) == pytest.approx(0.25)
