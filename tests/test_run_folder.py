"""What a run may do to its folder and what it finds there: no one's files are lost, and a run goes on from its own."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from test_rkl_train import QUICK, comparable, fails, plain, train_interrupted

from rkl.cli import main
from rkl.config import Config
from rkl.deploy import prune
from rkl.paths import check_apart
from rkl.train_options import read_options
from rkl.training import checkpoint, evaluation, learner, metrics
from rkl.training import train as trainer
from rkl.training.files import RunError
from rkl.training.run_log import RunLog, TrainingProgress

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return trainer.train(plain(tmp_path_factory.mktemp("runs") / "whole", width=8))


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("checkpoints/my_precious_model.pt", "weights"),
        ("checkpoints/last-0007.safetensors", "weights of a finished run"),
        ("tensorboard/notes.txt", "notes"),
        ("config.yaml", "lr: 0.1\n"),
        ("log.jsonl", "hours: 3\n"),
        ("metrics.json", "{}"),
        ("report.md", "my own notes"),
        ("plots/curves.png", "my own plot"),
        ("plots/confusion.png", "my own plot"),
    ],
)
def test_files_of_others_are_left_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, place: str, text: str
) -> None:
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    before = contents(tmp_path)
    for resume in ([], ["--resume", "--recipe", "smoke"]):
        said = fails(["train", *QUICK, "--out", str(tmp_path), "--lr", "1e30", *resume], capsys)
        assert f"out must be a new folder, got one with {place}, which" in said
        assert contents(tmp_path) == before


def test_a_failing_run_leaves_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """There are other files beside the run's own, and the leftovers of a run killed in its first epoch."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").write_bytes(b"of a killed run")
    before = contents(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", *QUICK, "--out", str(tmp_path), "--lr", "1e30"])
    assert "must be finite" in capsys.readouterr().err
    assert contents(tmp_path) == before
    main(["train", *QUICK, "--out", str(tmp_path)])
    assert contents(tmp_path).items() >= before.items()


def test_a_finished_run_without_its_checkpoints_is_not_written_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "checkpoints" / "last.json").unlink()
    before = contents(folder)
    assert "got one with metrics.json" in fails(["train", *QUICK, "--out", str(folder), "--lr", "1e30"], capsys)
    assert contents(folder) == before


def test_a_finished_run_does_not_look_at_the_test_images_again(
    run: Path, tmp_path: Path, no_plots: pytest.MonkeyPatch
) -> None:
    no_plots.undo()  # the plots too are to be the same
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = plain(folder, width=8)
    before = contents(folder)
    (folder / "report.md").unlink()  # as where it was stopped before the last file was written
    assert trainer.train(config, resume=True) == folder
    assert contents(folder) == before
    (folder / "metrics.json").unlink()  # as where it was stopped before the record was written
    trainer.train(config, resume=True)
    assert comparable(folder) == comparable(run)


def test_a_resumed_run_remembers_its_earlier_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one may only have had the test to do, and on another machine."""
    config = plain(tmp_path / "run")
    monkeypatch.setattr(evaluation, "peak_memory", lambda *_: 2**50)
    monkeypatch.setattr(evaluation, "device_name", lambda *_: "an old GPU")
    train_interrupted(config, monkeypatch, 1)
    trainer.train(config, resume=True)
    record = json.loads((config.out / "metrics.json").read_text())
    assert record["peak_memory_bytes"] == 2**50
    now = evaluation.default_device()
    assert record["device"] == f"an old GPU, {evaluation.device_name(now)}"
    assert record["precision"] == evaluation.precision_on(config, now)


def test_resume_takes_the_settings_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rkl train --resume --out FOLDER`, as the usage says, with a setting that a resumed run may change."""
    config = plain(tmp_path / "run", lr=0.04)
    train_interrupted(config, monkeypatch, 1)
    main(["train", "--resume", "--out", str(config.out), "--on-nan", "skip"])
    assert json.loads((config.out / "metrics.json").read_text())["epochs"] == config.epochs
    assert checkpoint.open_run(config.out).config.lr == 0.04


def test_a_run_killed_after_it_saved_its_best_model_tests_that_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the epoch may come out worse when it is trained again. Its first model is on the disk, and is tested."""
    real, save, values = trainer.evaluate, checkpoint.save, iter((0.5, 0.9, 0.1))

    def going(*arguments: Any) -> list[metrics.ExitMetrics]:
        accuracy = next(values)
        return [exit | {"accuracy": accuracy} for exit in real(*arguments)]

    def killed(folder: Path, name: str, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        if (name, facts["epoch"]) == ("last", 2):
            raise KeyboardInterrupt
        save(folder, name, tensors, facts)

    config = plain(tmp_path / "run", epochs=2, prune_at=(), prune_ratio=0.2, test_with="best")
    monkeypatch.setattr(trainer, "evaluate", going)
    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config)
    monkeypatch.setattr(checkpoint, "save", save)
    trainer.train(config, resume=True)
    record = json.loads((config.out / "metrics.json").read_text())
    assert checkpoint.open_run(config.out, "best").facts["epoch"] == record["epoch"] == 2
    assert record["best"] == {"epoch": 2, "accuracy": 0.9}


@pytest.mark.parametrize(("key", "value"), [("lr", 0.5), ("seed", 7), ("val_fraction", 0.3)])
def test_settings_that_were_edited_in_the_runs_own_file_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, key: str, value: float
) -> None:
    """A bare --resume reads them from there. A run that trained on with them could not be opened."""
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "metrics.json").unlink()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {key: value}))
    before = contents(folder)
    said = fails(["train", "--resume", "--out", str(folder)], capsys)
    assert f"got {key} {config[key]} for {value} in config.yaml; put {config[key]} back there" in said
    assert contents(folder) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_a_run_trains_in_takes_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    config = plain(tmp_path, epochs=2)
    refused, found = [], RunLog(config, resume=False)

    def second(progress: TrainingProgress, val: list[dict[str, float]]) -> None:
        before = contents(tmp_path)
        with pytest.raises(RunError, match="no other process trains in" if resume else "add --resume to go on") as told:
            trainer.train(config, resume)
        with pytest.raises(RunError, match="no other process trains in"), found.opened(0, writing=True):
            pass
        refused.append(str(told.value))
        assert contents(tmp_path) == before

    monkeypatch.setattr(TrainingProgress, "epoch", second)
    trainer.train(config)
    assert len(refused) == 2
    assert len(found.rows()) == 2
    before = contents(tmp_path)
    with pytest.raises(RunError, match="must be as it was found"), found.opened(0, writing=True):
        pass
    assert contents(tmp_path) == before


def test_a_cut_run_stopped_in_its_first_epoch_goes_on_from_the_cut_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = checkpoint.open_run(run)
    prune.prune_run(opened, tmp_path / "whole", 0.7, None, 2)
    train_epoch = trainer.train_epoch

    def stopped(*arguments: object) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        prune.prune_run(checkpoint.open_run(run), tmp_path / "stopped", 0.7, None, 2)
    monkeypatch.setattr(trainer, "train_epoch", train_epoch)
    main(["train", "--resume", "--out", str(tmp_path / "stopped")])
    ours, theirs = (checkpoint.open_run(tmp_path / name) for name in ("stopped", "whole"))
    image = torch.zeros(1, 1, 8, 8)
    assert metrics.count_macs(ours.model, image) <= 0.7 * metrics.count_macs(opened.model, image)
    for (name, one), other in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_cut_run_that_fails_leaves_nothing(run: Path, tmp_path: Path) -> None:
    opened = checkpoint.open_run(run)
    opened.config.__dict__["lr"] = 1e31
    with pytest.raises(ValueError, match="must be finite"):
        prune.prune_run(opened, tmp_path / "slim", 0.7, None, 1)
    assert not os.listdir(tmp_path)


def test_a_cut_run_that_fails_names_no_option_of_train(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rkl prune` has neither --lr nor --on-nan, --batch-size, --width or --compile."""
    opened, losses_of = checkpoint.open_run(run), trainer.training_losses

    def refused(what: Callable[..., object]) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "training_losses", what)
            with pytest.raises(RunError) as error:
                prune.prune_run(opened, tmp_path / "slim", 0.7, None, 1)
        return str(error.value)

    def nan_losses(*arguments: Any) -> dict[str, torch.Tensor]:
        return {name: loss * float("nan") for name, loss in losses_of(*arguments).items()}

    def uncompiled(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no working C++ compiler found")

    there = "in the config.yaml of the run that is cut"
    skip = f", or set on_nan to skip {there}, which leaves such steps out"
    assert refused(nan_losses) == (
        f"epoch 1, step 1: the training loss must be finite, got nan in 'deepest'; cut less{skip}"
    )
    assert refused(lambda *_: torch.empty(2**55)).endswith("; free some and run the command again")
    monkeypatch.setitem(opened.config.__dict__, "on_nan", "skip")
    assert "got none of" in refused(nan_losses)
    monkeypatch.setitem(opened.config.__dict__, "compile", True)
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    assert refused(uncompiled).endswith(f"; set compile to false {there}")


def test_a_remedy_for_a_cut_run_is_one(run: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "run"))
    settings = (whole / "config.yaml").read_text()
    (whole / "config.yaml").write_text(settings.replace("on_nan: stop", "on_nan: skip"))
    prune.prune_run(checkpoint.open_run(whole), tmp_path / "slim", 0.7, None, 1)
    assert checkpoint.open_run(tmp_path / "slim").config.on_nan == "skip"


def test_a_run_that_goes_on_in_another_precision_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The default follows the device. The record told it alone."""
    config = plain(tmp_path / "run", epochs=3)
    train_interrupted(config, monkeypatch, 1)
    log, said = config.out / "log.jsonl", f"rkl: {config.out}: trained in bf16-mixed on NVIDIA H200 so far"
    capsys.readouterr()
    for then, told in (("32-true", ""), ("bf16-mixed", f"{said}, goes on in 32-true on cpu\n")):
        (row,) = map(json.loads, log.read_text().splitlines())
        log.write_text(json.dumps(row | {"precision": then, "device": "NVIDIA H200"}) + "\n")
        trainer.RunLog(config, resume=True).warn_of_precision(torch.device("cpu"))
        assert capsys.readouterr().err == told
    trainer.train(config, resume=True)
    assert capsys.readouterr().err.startswith(told)


def test_a_file_that_cannot_be_written_names_a_way_on_that_there_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is the same command where nothing is left or --resume is given. `rkl prune` has no --resume."""
    config, opened, move = plain(tmp_path / "run", width=8), checkpoint.open_run(run), os.replace

    def said(file: str, act: Callable[[], object]) -> str:
        def full(old: Path, new: Path) -> None:
            if Path(new).name == file:
                raise OSError(errno.ENOSPC, "No space left on device")
            move(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(RunError) as error:
                act()
        assert f"{file}: must be writable, got: No space left on device; mend that and " in str(error.value)
        return str(error.value).split("mend that and ")[1]

    assert said("last.json", lambda: trainer.train(config)) == "run the command again"
    assert not config.out.exists()
    assert said("metrics.json", lambda: trainer.train(config)) == "add --resume to go on"
    assert said("metrics.json", lambda: trainer.train(config, resume=True)) == "run the command again"
    out = tmp_path / "slim"
    assert said("last.json", lambda: prune.prune_run(opened, out, 0.7, None, 1)) == "run the command again"
    go_on = said("report.md", lambda: prune.prune_run(opened, out, 0.7, None, 1))
    assert go_on == f"go on by rkl train --resume --out {out}"
    with pytest.raises(RunError, match="got one with a run in it; give another folder"):
        prune.prune_run(opened, out, 0.7, None, 1)
    main(go_on.split()[4:])


def test_an_unfinished_run_is_told_the_command_that_finishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`rkl prune` and `rkl report` have no --resume."""
    out = tmp_path / "run"
    train_interrupted(plain(out, epochs=2), monkeypatch, 1)
    capsys.readouterr()
    for command in (["report", str(out)], ["prune", str(out), "--out", str(tmp_path / "slim"), "--target-macs", "0.5"]):
        assert fails(command, capsys).endswith(f"; finish it by rkl train --resume --out {out}")


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        (trainer, "load_data", "the model and the data"),
        (learner, "build_model", "the model and the data"),
        (trainer, "training_losses", "a step"),
    ],
    ids=["data", "model", "step"],
)
def test_memory_that_is_short_before_a_whole_epoch_is_one_line(
    module: ModuleType, name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, lambda *arguments: torch.empty(2**55))
    with pytest.raises(RunError, match=f"{what} must fit in memory, got: .*; free some and run the command again, or"):
        trainer.train(plain(tmp_path / "run"))
    assert not os.listdir(tmp_path)


def test_a_line_of_the_log_is_on_the_disk_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def noting(file: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noting)
    trainer.train(plain(tmp_path / "run", epochs=2))
    log, saved = (f"{tmp_path}/run/{name}" for name in ("log.jsonl", "checkpoints/.last.json.partial"))
    assert [file for file in synced if file in (log, saved)] == 2 * [log, saved]


def test_a_run_that_started_from_anothers_weights_goes_on_without_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "first")
    config = plain(tmp_path / "run", width=8, weights=str(tmp_path / "first"))
    train_interrupted(config, monkeypatch, 1)
    shutil.rmtree(tmp_path / "first")
    trainer.train(config, resume=True)
    assert (config.out / "metrics.json").exists()


def test_resume_of_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped folder must not start the default run."""
    said = fails(["train", "--resume", "--out", str(tmp_path / "typo")], capsys)
    assert "out must be the folder of a run to --resume" in said
    assert not (tmp_path / "typo").exists()
    settings = read_options(["--resume", "--recipe", "paper", "--out", str(tmp_path / "new")]).settings
    assert settings == Config(tmp_path / "new"), "with a recipe it may begin one"


def test_no_run_lies_among_its_images(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There the run would be a class with its plots as images, and no one could find what it was trained on."""
    images = Path(shutil.copytree(run / "plots", tmp_path / "images" / "a")).parent
    shutil.copytree(run / "plots", images / "b")
    before, data = contents(tmp_path), f"folder:{images}"
    for out in (images, images / "runs" / "first"):
        for command in (["train"], ["experiments", "table5", "--scale", "smoke"]):
            said = fails([*command, "--data", data, "--out", str(out)], capsys)
            assert f"out must be outside the folder of the images, where it would be a class, got {out} in" in said
        with pytest.raises(ValueError, match="out must be outside"):
            trainer.train(plain(out, data=data), start=torch.nn.Identity())
    assert contents(tmp_path) == before
    check_apart(tmp_path / "images-2", data)
    check_apart(images / ".runs" / "first", data)
