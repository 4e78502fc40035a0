"""What a folder of experiments holds already: a further command neither mixes other runs into it nor loses some."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rkl.cli import main
from rkl.config import Config, to_plain
from rkl.paper import cells, experiments, tables
from rkl.paper.experiments import Experiment, experiment
from rkl.paper.rows import ROWS, TABLES, Row, Table
from rkl.training.files import RunError, write_text

SMALL = {"data": "digits", "image_size": 16}


@pytest.fixture(autouse=True)
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the runs that were asked for. Each gets a finished run's settings, and its images' fingerprint."""
    folders: list[Path] = []

    def pretend(config: Config, device: int | None, threads: int) -> None:
        data = experiments.load_data(config)
        write_text(config.out / "config.yaml", yaml.safe_dump(to_plain(config)))
        write_text(config.out / "gradients.json", "{}")
        facts = {"classes": data.classes, "fingerprint": data.fingerprint}
        write_text(config.out / "checkpoints" / "last.json", json.dumps(facts))
        folders.append(config.out)

    monkeypatch.setattr(cells, "in_own_process", pretend)
    return folders


def train(plan: Experiment, *rows: str) -> dict[str, Any]:
    """Run some rows of a plan, and return the record."""
    experiments.run(plan, jobs=1, announce=lambda _: None, only=rows)
    return json.loads(plan.record.read_text())


def test_a_table_goes_on_at_its_own_scale_alone(tmp_path: Path, trained: list[Path]) -> None:
    """With the other scale in its record the page would compare short runs with long ones, row by row."""
    plan = experiment("table5", "smoke", tmp_path, **SMALL)
    before = train(plan, "ResNet")
    other = experiment("table5", "cpu", tmp_path, seeds=1, **SMALL)
    with pytest.raises(RunError, match=r"table5-digits\.json: scale must be .*, 'smoke', got 'cpu'; give another out$"):
        train(other, "ResNet + logic")
    assert (json.loads(plan.record.read_text()), len(trained)) == (before, 1)
    (plan.folder("ResNet", 0) / "gradients.json").unlink()
    assert train(other, "ResNet + logic")["scale"] == "cpu", "no run was finished"


@pytest.mark.parametrize(("table", "row"), [("table5", "ResNet + logic"), ("factors", "ResNet + gate")])
def test_rows_that_are_not_trained_now_must_agree_too(
    tmp_path: Path, trained: list[Path], table: str, row: str
) -> None:
    """They stand on the same page, those that another table trained as well."""
    train(experiment("table5", "smoke", tmp_path, **SMALL), "ResNet")
    for settings in ({"image_size": 20}, {"lr": 0.5}):
        plan = experiment(table, "smoke", tmp_path, **SMALL | settings)
        with pytest.raises(
            RunError, match=f"resnet/seed-0: holds a run with {next(iter(settings))} .*give another out"
        ):
            train(plan, row)
    assert len(trained) == 1
    train(experiment(table, "smoke", tmp_path, **SMALL), row)
    assert len(trained) == 2


def test_rows_that_the_table_no_longer_has_stay_on_its_page(tmp_path: Path) -> None:
    plan = experiment("table5", "smoke", tmp_path, **SMALL)
    record = train(plan, "ResNet")
    gone = {"ResNet wide": ["runs/digits/resnet-wide/seed-0"]}
    write_text(plan.record, json.dumps(record | {"rows": gone | record["rows"]}))
    rows = train(plan, "ResNet + logic")["rows"]
    assert list(rows) == [*TABLES["table5"].rows, "ResNet wide"]
    assert rows == record["rows"] | gone


def test_rows_are_not_trained_on_other_images(
    tmp_path: Path, trained: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image was added to the data's folder since the first row. Differences between rows are paired by images."""
    plan, real = experiment("table5", "smoke", tmp_path, **SMALL), experiments.load_data
    train(plan, "ResNet")

    def with_others(config: Config) -> Any:
        return replace(real(config), fingerprint={"train": "others"})

    monkeypatch.setattr(experiments, "load_data", with_others)
    with pytest.raises(RunError, match="resnet/seed-0: data must be the images the run was trained on, got others"):
        train(plan, "ResNet + logic")
    assert len(trained) == 1


def test_a_setting_without_effect_is_refused_before_any_run(tmp_path: Path, trained: list[Path]) -> None:
    with pytest.raises(ValueError, match="mixup must go with a cutmix_probability below 1"):
        train(experiment("table5", "smoke", tmp_path, mixup=0.2, **SMALL), "ResNet")
    assert not trained
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "no-such-model"}, "last row: model must be one of resnet-kl, "),
        ({"model": "vgg", "width": 20}, "last row: width must be a multiple of 8 between 8 and 256, got 20"),
        ({"model": "resnet", "batch_size": 1}, "last row: batch_size must be at least 2"),
        ({"model": "resnet", "accumulate": 99}, "last row: batch_size x accumulate x devices must be at most"),
        ({"model": "resnet", "cutout": 17}, "last row: cutout must be at most the images' side of 16 pixels"),
        ({"model": "resnet", "weights": "none"}, "last row: none/checkpoints/last.json: a checkpoint must be there"),
        (
            {"prune_at": (0.5,), "prune_macs": 0.001},
            r"last row: prune_macs must be at least 0\.\d+, which is as far as",
        ),
        ({"model": "shufflenet", "prune_at": (0.5,)}, "last row: prune_at must be empty for shufflenet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_row_that_is_refused_costs_no_other_row(
    settings: dict[str, Any], said: str, tmp_path: Path, trained: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was refused in its turn, hours later."""
    monkeypatch.setitem(ROWS, "last row", Row(settings))
    monkeypatch.setitem(TABLES, "small", Table("Small", "digits", ("ResNet", "last row")))
    with pytest.raises(ValueError, match=f"^{said}"):
        train(experiment("small", "smoke", tmp_path, **SMALL), "ResNet", "last row")
    assert not trained
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_refused_costs_no_other_row(tmp_path: Path, trained: list[Path]) -> None:
    plan = experiment("table5", "smoke", tmp_path, **SMALL)
    begun = plan.config("ResNet + logic", 0)
    write_text(begun.out / "config.yaml", yaml.safe_dump(to_plain(replace(begun, lr=0.5))))
    write_text(begun.out / "checkpoints" / "last.json", "{}")
    with pytest.raises(RunError, match=r"a resumed run must keep its settings, got lr 0\.01 for 0\.5"):
        train(plan, "ResNet", "ResNet + logic")
    assert not trained


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("config.yaml", "out must be a new folder or one of `rkl experiments`, got one with a run in it; give another"),
        ("notes.json", r"notes\.json: must be a record of `rkl experiments`, got a damaged one"),
    ],
)
def test_a_folder_without_a_page_is_refused_before_any_run(
    tmp_path: Path, trained: list[Path], place: str, said: str
) -> None:
    """The command trained every row first, and its page was refused then."""
    write_text(tmp_path / place, "{}")
    with pytest.raises(RunError, match=said):
        train(experiment("table5", "smoke", tmp_path, **SMALL), "ResNet")
    assert not trained
    assert [path.name for path in tmp_path.iterdir()] == [place]


def test_missing_files_are_downloaded_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Experiment] = []
    monkeypatch.setattr(experiments, "run", lambda plan, *_, **__: plans.append(plan))
    monkeypatch.setattr(tables, "write", lambda out: out)
    command = ["experiments", "table5", "--scale", "smoke", "--out", str(tmp_path)]
    main(command)
    main([*command, "--download", "--data-root", str(tmp_path)])
    (tmp_path / "a.yaml").write_text("download: true\nlr: 0.2")
    main([*command, "--config", str(tmp_path / "a.yaml")])
    assert [plan.overrides for plan in plans] == [
        {},
        {"download": True, "data_root": tmp_path},
        {"download": True, "lr": 0.2},
    ]
