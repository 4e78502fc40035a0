"""Damaged and hostile checkpoints, configurations and records.

Each is refused in one line that names it, or means what it meant before. Nothing is run or written for it, and no large
memory is held.
"""

from __future__ import annotations

import ast
import io
import json
import mmap
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mutations
import pytest
import torch
from mutations import MOST, clear_peak, flipped, headless, mutated, never, refusals, spliced, truncated, watched

from rkl.cli import main
from rkl.config import Config, read_yaml
from rkl.deploy.predict import thresholds_of
from rkl.paper.records import load_results
from rkl.training import checkpoint, report
from rkl.training import train as trainer
from rkl.training.files import RunError, read_lines

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few kilobytes."""
    out = tmp_path_factory.mktemp("sound") / "run"
    config = Config(out, width=4, image_size=8, train_size=60, test_size=20, epochs=1, batch_size=32, exits=False)
    assert trainer.train(config) == out
    return out


def same_weights(first: checkpoint.Run) -> Callable[[object], bool]:
    def same(run: object) -> bool:
        assert isinstance(run, checkpoint.Run)
        ours, theirs = run.model.state_dict(), first.model.state_dict()
        return all(torch.equal(ours[name], theirs[name]) for name in theirs)

    return same


def same_run(first: checkpoint.Run) -> Callable[[object], bool]:
    weights = same_weights(first)
    return lambda run: isinstance(run, checkpoint.Run) and run.facts == first.facts and weights(run)


def copied(run: Path, to: Path) -> tuple[Path, Path, Path]:
    """A copy of a run, its checkpoint's JSON and its tensors."""
    shutil.copytree(run, to)
    (tensors,) = (to / "checkpoints").glob("last-*.safetensors")
    return to, to / "checkpoints" / "last.json", tensors


def test_damaged_tensors_are_refused(sound: Path, tmp_path: Path) -> None:
    run, _, file = copied(sound, tmp_path / "run")
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    pickled = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, pickled)

    def with_header(**changes: object) -> bytes:
        written = json.dumps(header | {name: header[name] | changes}).encode()
        return struct.pack("<Q", len(written)) + written + content[8 + length :]

    crafted = [
        ("empty", b""),
        ("a header of 2^63 bytes", struct.pack("<Q", 2**63) + content[8:]),
        ("a header of 4 GB", struct.pack("<Q", 2**32) + content[8:]),
        ("a tensor of 2^60 values", with_header(shape=[2**30, 2**30])),
        ("a tensor beyond the file", with_header(data_offsets=[0, 2**40])),
        ("values of another type", with_header(dtype="I32")),
        ("torch.save's pickle", pickled.getvalue()),
    ]
    damage = mutated(content, {truncated: 8, flipped: 16, headless: 2, spliced: 4})
    cases = [*crafted, *damage]
    assert refusals(file, cases, lambda: checkpoint.open_run(run), never) == len(cases)
    checkpoint.open_run(run)


def test_damaged_records_of_a_checkpoint_are_refused_or_mean_the_same(sound: Path, tmp_path: Path) -> None:
    run, record, _ = copied(sound, tmp_path / "run")
    same = same_run(checkpoint.open_run(run))
    damage = [*mutated(record.read_bytes(), {truncated: 6, flipped: 24, headless: 2, spliced: 4})]
    crafted = [
        ("another kind", b"[1]"),
        ("deep", b"[" * 100_000),
        ("an integer of 5,000 digits", b'{"epoch": ' + b"9" * 5000 + b"}"),
        ("no text", b"\xff\xfe\x00"),
    ]
    assert refusals(record, crafted, lambda: checkpoint.open_run(run), never) == len(crafted)
    assert refusals(record, damage, lambda: checkpoint.open_run(run), same) >= len(damage) - 2


def test_hostile_records_with_a_right_checksum_are_refused(sound: Path, tmp_path: Path) -> None:
    """A checksum cannot detect these: names that lead out of the folder, sizes that would take all memory."""
    run, record, tensors = copied(sound, tmp_path / "run")
    facts = json.loads(record.read_text())
    del facts["sha256"]
    outside = [str(tensors), f"../checkpoints/{tensors.name}", "/etc/passwd", "..", "", "a/b.safetensors", 3, None]
    changes: list[dict[str, object]] = [{"tensors": name} for name in outside]
    changes += [{"channels": value} for value in (10**9, 0, "3", None, [1])]
    changes += [{"image_size": value} for value in (10**9, -8, 8.5, "8")]
    changes += [{"classes": value} for value in ([], "0123456789", {"a": 1}, [1, 2], [["a"]] * 10)]
    changes += [{"plan": value} for value in (None, [], {"fc": [1, 1]}, {"fc": "ab"}, {"fc": [-1, 10**9]})]
    changes += [{"plan": facts["plan"] | {"fc": value}} for value in ([10**9, 10], [0, 0], [32], ["a", "b"])]
    changes += [
        {"mean": [float("nan")]},
        {"mean": []},
        {"std": [0.5, 0.5]},
        {"std": "abc"},
        {"epoch": -1},
        {"epoch": "one"},
        {"config": []},
    ]
    cases = []
    for change in changes:
        lying = facts | change
        cases.append((str(change)[:60], json.dumps(lying | {"sha256": checkpoint.digest(lying, tensors)}).encode()))
    assert refusals(record, cases, lambda: checkpoint.open_run(run), never) == len(cases)


def test_no_run_goes_on_from_a_hostile_record(sound: Path, tmp_path: Path) -> None:
    run, record, tensors = copied(sound, tmp_path / "run")
    (run / "metrics.json").unlink()  # as where it was stopped before its test
    config, facts = replace(read_yaml(run / "config.yaml"), out=run), json.loads(record.read_text())
    del facts["sha256"]
    changes: list[dict[str, object]] = [{"best": value} for value in (3, "abc", [1], {"epoch": 1}, {"epoch": "one"})]
    changes += [{"cuts": value} for value in (3, "abc", [1], [{}], [{"epoch": 1, "before": {}, "after": {}}])]
    changes += [{"scaler": "abc"}, {"plan": None}, {"epoch": None}]
    lying = [facts | change for change in changes] + [{key: facts[key] for key in facts if key != "plan"}]
    cases = [
        (str(each)[-60:], json.dumps(each | {"sha256": checkpoint.digest(each, tensors)}).encode()) for each in lying
    ]
    assert refusals(record, cases, lambda: trainer.train(config, resume=True), never) == len(cases)
    values, facts = checkpoint.load(record.parent, "last")
    name = next(key for key in values if key.startswith("momentum.") and values[key].ndim == 4)
    checkpoint.save(record.parent, "last", values | {name: values[name][:1]}, facts)
    with pytest.raises(RunError, match=f"must be a whole run's checkpoint, got a damaged one .*{name} is "):
        trainer.train(config, resume=True)


@pytest.mark.parametrize(
    "change", [{"width": 4096}, {"scales": [2**31 - 1]}, {"model": "vgg", "width": 256}, {"depth": 50}]
)
def test_a_model_of_another_size_is_refused_before_it_takes_memory(
    sound: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    run, record, tensors = copied(sound, tmp_path / "run")
    facts = json.loads(record.read_text())
    del facts["sha256"]
    facts["config"] |= change
    record.write_text(json.dumps(facts | {"sha256": checkpoint.digest(facts, tensors)}))
    plain = facts["config"] | {"out": "x"}
    case = ("huge", json.dumps(plain).encode())  # JSON is YAML
    # The width is that before all cuts. The plan of channels may lead from any width to these tensors.
    accepts = same_weights(checkpoint.open_run(sound)) if "width" in change and "model" not in change else never
    refusals(run / "config.yaml", [case], lambda: checkpoint.open_run(run), accepts)


BOMB = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{name}: &{name} [{', '.join(f'*{before}' for _ in range(8))}]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)


def test_bad_configurations_are_refused_or_mean_the_same(sound: Path, tmp_path: Path) -> None:
    run, _, _ = copied(sound, tmp_path / "run")
    file = run / "config.yaml"
    marker = tmp_path / "run" / "ran"
    hostile = [
        f"lr: !!python/object/apply:os.system ['touch {marker}']",
        f"lr: !!python/object/new:subprocess.Popen [['touch', '{marker}']]",
        "lr: !!python/name:os.system",
        BOMB,
        f"{BOMB}lr: *k",
        "a: &a {b: 1}\n<<: [*a, *a]",
        "[" * 20_000,
        "{a: " * 5_000,
        "epochs: " + "9" * 5_000,
        "epochs: 1e999",
        "lr: 2024-99-99",
        "lr: !!bool perhaps",
        "lr: !!int ''",
        "lr: !!binary '*'",
        "lr: \0",
        "? [a, b]\n: 1",
        "? {a: b}\n: 1",
        "loss: {x: {y: 1}}",
        "scales: [[[1]]]",
        "width: 1000000000000",
        "",
        "\ufeff",
    ]
    cases = [(text[:30], text.encode()) for text in hostile]
    assert refusals(file, cases, lambda: read_yaml(file), never) == len(cases)
    damage = [*mutated(file.read_bytes(), {truncated: 6, flipped: 20, spliced: 4})]
    refused = refusals(file, damage, lambda: checkpoint.open_run(run), same_run(checkpoint.open_run(sound)))
    assert refused >= len(damage) // 2
    assert not marker.exists()


def test_bad_records_of_a_run_are_refused_by_what_reads_them(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, _ = copied(sound, tmp_path / "run")
    file, log = run / "metrics.json", run / "log.jsonl"
    record = json.loads(file.read_text())
    changes = [{key: value} for key in ("test", "size", "cuts", "best") for value in (3, "x", [{}])]
    cases = [(str(change), json.dumps(record | change).encode()) for change in changes]
    cases += mutated(file.read_bytes(), {truncated: 6})
    for name in ("_plot_curves", "plot_confusion", "write_text"):
        monkeypatch.setattr(report, name, lambda *arguments: None)
    assert refusals(file, cases, lambda: report.write_report(run), never) == len(cases)
    rows = [("a list", b"[1]\n"), ("nothing", b"{}\n"), ("text", b"a\n"), ("no text", b"\xff\n"), ("deep", b"[" * 9**5)]
    assert refusals(log, rows[:4], lambda: read_lines(log), never) == 4
    assert refusals(log, mutated(log.read_bytes(), {truncated: 4}), lambda: read_lines(log), lambda x: x == []) == 0
    opened = checkpoint.open_run(run)
    for name in ("metrics.json", "early_exit.json"):
        marks = {"tested": "last", "checkpoint": "last", "epoch": opened.facts["epoch"]}
        wrong = [(str(v), json.dumps(marks | {"thresholds": v}).encode()) for v in (3, "abc", [1], ["a"] * 3, {"a": 1})]
        assert refusals(run / name, wrong, lambda: thresholds_of(opened, "last"), never) == len(wrong)
    log.unlink()
    file.write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"log\.jsonl: a run's log must have its epochs, got none; copy it from the run"):
        report.write_report(run)


def test_the_command_line_says_it_in_one_line(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, record, _ = copied(sound, tmp_path / "run")
    record.write_text("[" * 100_000)
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(run)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"rkl: {record}: must be a checkpoint's JSON record")


def test_an_experiments_record_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    plan = {"table": "t", "data": "d", "scale": "s", "rows": {"a": ["../elsewhere"]}}
    (tmp_path / "t.json").write_text(json.dumps(plan))
    with pytest.raises(RunError, match=r"t\.json: runs must be folders below .*, got '\.\./elsewhere'"):
        load_results(tmp_path)


def test_bad_records_of_a_tables_runs_are_refused(sound: Path, tmp_path: Path) -> None:
    """By name, before the latencies are measured. A page of many runs did not say which of them it could not read."""
    run, _, _ = copied(sound, tmp_path / "runs" / "a")
    (run / "gradients.json").write_text(json.dumps({"norms": {}, "shares": {"deepest": 1.0}}))
    table = tmp_path / "table5-digits.json"
    rows = {"table": "table5", "data": "digits", "scale": "smoke", "rows": {"ResNet": ["runs/a"]}}
    table.write_text(json.dumps(rows))
    assert load_results(tmp_path)[0].rows["ResNet"][0].seed == 0
    record = json.loads((run / "metrics.json").read_text())
    needed = [*("seed", "test", "test_images", "training_loss", "size", "seconds", "data_share"), "peak_memory_bytes"]
    needed += ["device", "confusion", "classes"]
    changes = [record | {key: value} for key in needed for value in (None, {}, [{}])]
    changes += [{other: record[other] for other in record if other != key} for key in needed]
    changes += [record | {"test_looked_at": value} for value in ("noon", "2026-11-26T21:55:53")]
    for name, content in {
        "metrics.json": changes,
        "gradients.json": [{}, {"shares": 3}, {"shares": {"deepest": "x"}}],
        "log.jsonl": [{}, {"epoch": 1}, {"epoch": 1, "val": [{}]}],
        "config.yaml": [{}, {"loss": 3}],
    }.items():
        cases = [(str(each)[:60], (json.dumps(each) + "\n").encode()) for each in content]
        assert refusals(run / name, cases, lambda: load_results(tmp_path), never) == len(cases)
    case = ("another table", json.dumps(rows | {"table": "table9"}).encode())
    assert refusals(table, [case], lambda: load_results(tmp_path), never) == 1


def test_the_records_of_this_repository_are_read() -> None:
    folders = [folder for folder in (ROOT / "results").iterdir() if folder.is_dir()]
    assert len(folders) >= 3
    assert sum(results.finished for folder in folders for results in load_results(folder)) > 100


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
ALLOWED = {"rkl/data/formats.py": {"pickle"}}
"""CIFAR's own files are pickles. Their reader refuses every global except those of arrays (test_bad_data.py)."""


def test_the_watch_sees_memory_below_an_earlier_peak(tmp_path: Path) -> None:
    def hold(size: int) -> None:
        with mmap.mmap(-1, size) as memory:  # not of the heap, which may keep what was freed
            memory[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)

    if why := clear_peak():
        pytest.skip(why)
    hold(2 * MOST)
    with pytest.raises(AssertionError, match="bytes more were held"), watched(tmp_path):
        hold(MOST + 2**24)


def test_the_watch_does_without_a_peak_that_it_may_not_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden = tmp_path / "none" / "clear_refs"
    monkeypatch.setattr(mutations, "CLEARS", forbidden)
    assert clear_peak() == (
        f"the peak of this process's memory cannot be cleared: {forbidden}: No such file or directory"
    )
    with watched(tmp_path):
        pass
    with pytest.raises(AssertionError), watched(tmp_path):
        (tmp_path / "written").write_text("")


def test_nothing_unpickles_or_runs_a_file() -> None:
    for path in [*ROOT.glob("rkl/**/*.py"), *ROOT.glob("rkl_kernels/**/*.py")]:
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not {m.split(".")[0] for m in modules} & FORBIDDEN - ALLOWED.get(name, set()), where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called not in ("eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"), (
                    where
                )
                assert called not in ("pickle.load", "pickle.loads", "np.load", "numpy.load"), where
                assert called != "torch.load" or keywords.get("weights_only") == "True", where
                assert keywords.get("allow_pickle", "False") == "False", where
                assert keywords.get("shell", "False") == "False", where
