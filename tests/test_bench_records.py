"""The records of benchmark runs: how they are written, read, compared and measured again."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_rows import TINY, Net, row_of

from benchmarks import compare, gpu_report, models, report, suite
from rkl_kernels.bench.row import Row, from_json, to_json
from rkl_kernels.bench.timing import Timing

ROOT = Path(__file__).parents[1]


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


def test_a_model_that_fails_now_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = run_of(row_of(ours_nchw=2.0, eager_nchw=4.0))
    new = run_of(row_of(ours_nchw=2.0, eager_nchw=4.0))
    old.models.insert(0, replace(old.models[0], direction="inference"))
    wrong = {"ours nhwc": "wrong: logits off by 1 of the largest"}
    for failed, lines in (
        (
            {"times": {"eager nchw": Timing(2, 0, 9)}, "rejected": wrong},
            [f"training step, ours nhwc: was timed, now {wrong['ours nhwc']}"],
        ),
        (
            {"times": {}, "rejected": {"all": "fails: E: e"}},
            [f"{d}, ours nhwc: was timed, now fails: E: e" for d in models.DIRECTIONS],
        ),
    ):
        new.models = [replace(old.models[1], **failed)]
        if len(lines) == 1:
            new.models.insert(0, old.models[0])
        assert judged(tmp_path, new, old) == 1
        told = capsys.readouterr().out
        assert [line for line in told.splitlines() if line.startswith("lost")] == [
            f"lost: Net {line}" for line in lines
        ]
        assert "not reached" not in told


def test_a_rival_that_fails_in_one_run_alone_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*rivals: str, why: str) -> suite.Run:
        """A run with ours and these rivals timed, in the row and in the model. The other rivals are rejected."""
        others = [name for name in ("eager nchw", "eager nhwc") if name not in rivals]
        row = row_of(ours_nchw=2.0, **{name.replace(" ", "_"): 4.0 for name in rivals})
        row.rejected = dict.fromkeys(others, why)
        model = run_of(row).models[0]
        times = {"ours nhwc": Timing(1, 0, 9)} | {name: Timing(2, 0, 9) for name in rivals}
        return replace(run_of(row), models=[replace(model, times=times, rejected=row.rejected)])

    old, new = run("eager nchw", why="wrong: NaN"), run("eager nhwc", why="fails: E: e")
    assert judged(tmp_path, new, old) == 0, "none of ours got worse"
    assert capsys.readouterr().out.splitlines()[:-1] == [
        *(f"rival fails: {id}, eager nchw: was timed, now fails: E: e" for id in (TINY.id, "Net training step")),
        *(f"rival is back: {id}, eager nhwc: is timed, was wrong: NaN" for id in (TINY.id, "Net training step")),
    ]
    assert judged(tmp_path, old, old) == 0
    assert "rival" not in capsys.readouterr().out
    assert judged(tmp_path, run(why="fails: E: e"), old) == 0
    assert "rival fails: Net training step, eager nchw: was timed, now fails: E: e" in capsys.readouterr().out


def judged(folder: Path, new: suite.Run, old: suite.Run) -> int:
    """The exit code of compare.py."""
    new.save(folder / "new.json")
    old.save(folder / "old.json")
    return compare.main([str(folder / "new.json"), str(folder / "old.json")])


def test_what_a_run_does_not_reach_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = row_of(ours_nchw=2.0, eager_nchw=4.0), row_of(replace(TINY, direction="backward"), ours_nchw=2.0)
    old = run_of(first, other, row_of(replace(TINY, name="theirs alone"), eager_nchw=1.0))
    assert judged(tmp_path, replace(old, rows=[first], models=[], left_out=[other.case.id]), old) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"not reached: {n}: was timed, the new run has no such row" for n in (other.case.id, "Net training step")
    ]
    assert lines[2:] == ["1 rows compared: 0 slower, 0 faster, 0 lost"]
    empty = replace(old, rows=[], models=[])
    assert judged(tmp_path, replace(old, models=[]), empty) == 1
    assert "nothing compared: the runs have no row of ours in common" in capsys.readouterr().out
    part = replace(old, rows=[other], models=[], only="backward")
    assert judged(tmp_path, part, old) == 0, "a part is held against that part"
    assert judged(tmp_path, replace(part, rows=[]), old) == 1
    whole = replace(old, models=[])
    assert judged(tmp_path, whole, old) == 1
    assert "not reached: Net training step: " in capsys.readouterr().out
    assert judged(tmp_path, replace(whole, no_models=True), old) == 0, "nobody asked for models"
    assert "not reached" not in capsys.readouterr().out


def test_a_run_that_time_cut_short_replaces_no_fuller_record(tmp_path: Path) -> None:
    first, other = row_of(ours_nchw=2.0), row_of(replace(TINY, direction="backward"), ours_nchw=2.0)
    path, beside = tmp_path / "cpu.json", tmp_path / "cpu.part.json"
    whole, cut = run_of(first, other), replace(run_of(first), left_out=[other.case.id])
    assert suite.place(path, cut) == path, "there is none"
    path.write_text("no record")
    assert suite.place(path, cut) == path
    whole.save(path)
    assert suite.place(path, cut) == beside
    assert suite.place(path, whole) == path
    assert suite.place(path, run_of(first)) == path, "there is no such row any more"
    cut.save(path)
    assert suite.place(path, cut) == path


def test_bench_compare_has_the_time_that_the_committed_records_took() -> None:
    (line,) = re.findall(r"benchmarks\.suite .*--out runs/bench", (ROOT / "Makefile").read_text())
    within = re.search(r"--within (\d+)", line)
    records = [suite.Run.load(path) for path in suite.RESULTS.glob("*-2-threads.json")]
    assert records
    for record in records:
        assert record.rows
        assert not record.left_out
        assert within, f"{line} ends before all rows are measured, and compare.py calls the others missing"
        assert int(within[1]) > record.seconds


def test_the_committed_pages_are_of_the_committed_records() -> None:
    """`python -m benchmarks.report FILE.json` writes a page again, `benchmarks.gpu_report` that of a GPU."""
    records = [path for path in suite.RESULTS.glob("*-threads*.json") if not path.stem.endswith("-models")]
    assert len(records) > 5
    for path in records:
        page, plot = path.with_suffix(".md").read_text(), path.with_suffix(".png").name
        if path.name.startswith("nvidia"):
            assert page == gpu_report.markdown(gpu_report.GpuRun.load(path), plot), path.name
        else:
            assert page == report.markdown(suite.Run.load(path), plot), path.name


def test_a_page_is_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    run_of(row_of(ours_nchw=2.0, eager_nchw=4.0)).save(path)
    assert report.main([str(path)]) == 0
    assert "| depthwise forward fp32 | 1 | 2.00 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").is_file()
    path.write_text("{}")
    with pytest.raises(SystemExit):
        report.main([str(path)])
    assert "error: FILE.json must be the record of a run, got " in capsys.readouterr().err


def test_a_single_sample_is_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = (row_of(ours_nchw=seconds, eager_nchw=4.0) for seconds in (2.0, 20.0))
    new.times["ours nchw"] = Timing(20.0, math.inf, 1)
    runs = [replace(run_of(row), models=[]) for row in (new, old)]
    assert judged(tmp_path, *runs) == 0
    told = capsys.readouterr().out
    assert "not judged: 1 rows, of which a run has a single sample and so no noise" in told
    data = json.loads((tmp_path / "new.json").read_text(), parse_constant=pytest.fail)
    assert data["rows"][0]["times"]["ours nchw"] == {"seconds": 20.0, "noise": None, "samples": 1}
    data["rows"][0]["times"]["ours nchw"]["noise"] = 0.0  # as earlier records have it
    (tmp_path / "new.json").write_text(json.dumps(data))
    assert suite.Run.load(tmp_path / "new.json") == runs[0]
    assert report.markdown(runs[0], "run.png").count("| ? |") == 1


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


def test_a_run_without_a_row_measured_twice_has_no_noise(tmp_path: Path) -> None:
    row = row_of(ours_nchw=4.0, eager_nchw=12.0)
    run = replace(run_of(row), noise=suite.noise_between([]), models=[])
    run.save(tmp_path / "run.json")
    assert suite.Run.load(tmp_path / "run.json") == run
    assert "No row was measured twice." in report.markdown(run, "run.png")
    assert run.with_rows_of(run, "tiny").noise is None
    assert run.with_rows_of(run_of(row, noise=0.2), "tiny").noise == 0.2
    assert judged(tmp_path, run, run) == 0


def test_again_wants_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--only", "trelu forward fp32"], []):
        with pytest.raises(SystemExit):
            suite.main(["--again", "--out", str(tmp_path), *arguments])
        assert "--again must have --only and a record to go into" in capsys.readouterr().err


@pytest.mark.parametrize("part", [[], ["--only", "forward fp32 rkl-4-k3"]])
def test_operators_alone_do_not_replace_models(
    part: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(row_of(replace(TINY, name="rkl-4-k3"), ours_nchw=2.0, eager_nchw=4.0))
    monkeypatch.setattr(
        suite, "perform", lambda chosen, with_models, _: run if with_models else replace(run, models=[])
    )
    arguments = [*part, "--out", str(tmp_path)]
    assert suite.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    before = path.read_text()
    with pytest.raises(SystemExit):
        suite.main([*arguments, "--no-models"])
    told = capsys.readouterr().err
    assert f"error: --no-models must not replace a record with models, got {path}; give another --out" in told
    assert path.read_text() == before
    other = ["--out", str(tmp_path / "other")]
    for _ in range(2):
        assert suite.main([*part, *other, "--no-models"]) == 0, "a record without models may be replaced"
    (without,) = (tmp_path / "other").glob("*.json")
    assert suite.Run.load(without).no_models
    assert not suite.Run.load(path).no_models
    path.write_text("{}")
    with pytest.raises(SystemExit):
        suite.main([*arguments, "--no-models"])
    assert "error: --out must be the record of a run, got " in capsys.readouterr().err


def test_a_part_has_a_record_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = row_of(replace(TINY, name="rkl-4-k3"), ours_nchw=2.0, eager_nchw=4.0)
    whole = suite.record(tmp_path, "", again=False)
    here = replace(run_of(row, row_of(ours_nchw=1.0, eager_nchw=1.0)), machine=suite.machine())
    here.save(whole)
    before = whole.read_text()
    monkeypatch.setattr(suite, "perform", lambda *_: replace(run_of(row), models=[]))
    assert suite.main(["--only", "forward fp32 rkl-4-k3", "--out", str(tmp_path)]) == 0
    assert whole.read_text() == before
    (part,) = tmp_path.glob("*.*.json")
    assert part.name == f"{whole.stem}.forward-fp32-rkl-4-k3.json"
    assert suite.Run.load(part).only == "forward fp32 rkl-4-k3"
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    assert compare.main([str(part)]) == 0, "against the same rows of the whole record"
    assert suite.main(["--only", "forward fp32 rkl-4-k3", "--again", "--out", str(tmp_path)]) == 0
    assert len(suite.Run.load(whole).rows) == 2
    replace(here, machine=here.machine | {"torch": "2.11.0"}).save(whole)
    with pytest.raises(SystemExit):
        suite.main(["--only", "forward fp32 rkl-4-k3", "--again", "--out", str(tmp_path)])
    told = capsys.readouterr().err
    assert "error: --again must be for a record of this machine and its versions, got " in told
    assert "torch 2.11.0" in told


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
    nothing = suite.perform(tiny, with_models=False, within=0.0)
    assert nothing.left_out == [case.id for case in tiny]
    assert nothing.noise is None, "no row was measured twice"
    assert suite.noise_between([(row_of(ours_nchw=2.0), row_of(ours_nchw=2.5))]) == pytest.approx(0.25)
