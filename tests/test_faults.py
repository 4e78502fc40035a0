"""Runs that are killed, starved, cut off or poisoned.

None loses what was written, and each goes on to the weights of an undisturbed run, bit for bit. `make faults` kills
hundreds of runs; here it is a few.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from test_rkl_train import comparable

from rkl.config import Config, from_plain
from rkl.paper import cells
from rkl.training import checkpoint, guard
from rkl.training import train as trainer
from rkl.training.files import RunError

pytestmark = [pytest.mark.usefixtures("one_thread", "no_plots"), pytest.mark.xdist_group("faults")]

KILLS = int(os.environ.get("RKL_FAULTS", "6"))
"""How many runs to kill: half of them before chosen writes, half at random moments."""
SMALL = Config(
    model="resnet",
    width=4,
    image_size=8,
    train_size=80,
    test_size=20,
    epochs=3,
    batch_size=32,
    lr=0.05,
    ema=0.9,
    prune_at=(0.3,),
    prune_ratio=0.3,
)


def small(out: Path, **changes: object) -> Config:
    return from_plain(changes | {"out": str(out)}, SMALL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of an undisturbed run, and its writes. It has three epochs and a cut after the first."""
    folder = tmp_path_factory.mktemp("whole")
    assert faults.ended(small(folder / "run"), fault=partial(faults.note_writes, str(folder / "writes"))) == 0
    return folder / "run", (folder / "writes").read_text().splitlines()


def assert_same(run: Path, whole: Path) -> None:
    """The runs agree bit for bit in weights, momentum and averages, and in their records except times.

    No file is half written.
    """
    for name in ("last", "best"):
        ours, theirs = (checkpoint.load(folder / "checkpoints", name)[0] for folder in (run, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert comparable(run) == comparable(whole)
    assert (run / "report.md").exists()
    assert not [*run.rglob("*.partial")]


def goes_on(config: Config, whole: Path) -> None:
    """A run resumed in a separate process, from whatever is there, ends as the whole one did."""
    assert faults.ended(config, resume=True) == 0
    assert_same(config.out, whole)


def moments(count: int, writes: list[str]) -> list[int]:
    """Numbers of writes, spread evenly over the run. The save after the cut's epoch is among them."""
    chosen = {round(i * (len(writes) - 1) / max(1, count - 1)) for i in range(count)}
    return sorted(chosen | {writes.index("os.rename .last.json.partial last.json", len(writes) // 3)})


def test_a_run_killed_before_a_write_goes_on(tmp_path: Path, whole: tuple[Path, list[str]]) -> None:
    run, writes = whole
    first = writes.index("os.rename .last.json.partial last.json")
    for number in moments(KILLS // 2, writes):
        config = small(tmp_path / f"run{number}")
        assert faults.ended(config, fault=partial(faults.kill_at_write, number)) == -signal.SIGKILL, writes[number]
        if number > first:
            checkpoint.open_run(config.out)
        goes_on(config, run)


@pytest.mark.parametrize(
    "fault", [partial(faults.kill_in_tensors, 3), partial(faults.kill_in_log, 2)], ids=["tensors", "log"]
)
def test_a_run_killed_in_the_middle_of_a_write_goes_on(
    tmp_path: Path, whole: tuple[Path, list[str]], fault: faults.Fault
) -> None:
    config = small(tmp_path / "run")
    assert faults.ended(config, fault=fault) == -signal.SIGKILL
    checkpoint.open_run(config.out)
    goes_on(config, whole[0])


def test_a_run_killed_again_and_again_at_random_moments_goes_on(tmp_path: Path, whole: tuple[Path, list[str]]) -> None:
    draw, number, kills = random.Random(0), 0, 0
    seconds = json.loads((whole[0] / "metrics.json").read_text())["seconds"]
    while kills < KILLS - KILLS // 2:
        config, number = small(tmp_path / f"run{number}"), number + 1
        resume = False
        while True:
            process = faults.started(config, resume)
            process.join(draw.uniform(0.5, 1 + 2 * seconds))
            if process.exitcode is not None or kills == KILLS - KILLS // 2:
                break
            process.kill()
            process.join()
            kills, resume = kills + 1, True
            if (config.out / "checkpoints" / "last.json").exists():
                checkpoint.open_run(config.out)
        process.join()
        assert process.exitcode == 0
        assert_same(config.out, whole[0])


def one_line(output: Path) -> str:
    """The error message among the lines that a run wrote to stderr."""
    text = output.read_text()
    assert "Traceback" not in text
    (line,) = (line for line in text.splitlines() if line.startswith(("rkl: ", "stopped; ")))
    return line


def test_ctrl_c_in_a_save_keeps_the_checkpoint_before_it(tmp_path: Path, whole: tuple[Path, list[str]]) -> None:
    run, writes = whole
    place = [number for number, name in enumerate(writes) if name == "os.rename .last.json.partial last.json"][1]
    config, output = small(tmp_path / "run"), tmp_path / "output"
    assert faults.ended(config, fault=partial(faults.kill_at_write, place, by=signal.SIGINT), output=output) == 130
    assert one_line(output).startswith("stopped; train goes on from the last whole epoch with --resume")
    checkpoint.open_run(config.out)
    goes_on(config, run)


@pytest.mark.parametrize(("epoch", "limit", "file"), [(0, 600, "config.yaml"), (2, 20_000, ".safetensors")])
def test_a_disk_without_space_ends_a_run_in_one_line(
    tmp_path: Path, whole: tuple[Path, list[str]], epoch: int, limit: int, file: str
) -> None:
    config, output = small(tmp_path / "run"), tmp_path / "output"
    assert faults.ended(config, fault=partial(faults.small_files, epoch, limit), output=output) == 2
    line = one_line(output)
    assert f"{file}: must be writable, got: " in line
    assert "File too large" in line
    if epoch:
        assert checkpoint.load(config.out / "checkpoints", "last")[1]["epoch"] == epoch - 1
    else:
        assert not config.out.exists()
    goes_on(config, whole[0])


def test_a_folder_that_may_not_be_written_is_refused_before_training(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp())
    config, output = small(folder / "run"), tmp_path / "output"
    try:
        folder.chmod(0o555)
        assert faults.ended(config, fault=faults.without_rights, output=output) == 2
        assert f"{config.out}: out must be a writable folder, got {folder}, which is none" in one_line(output)
        assert not config.out.exists()
    finally:
        folder.rmdir()


def poisoned(monkeypatch: pytest.MonkeyPatch, number: int, poison: Any) -> None:
    """``poison`` replaces the loss terms of the batch of that number, counted from 0."""
    losses_of, count = trainer.training_losses, 0

    def losses(*arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        own = losses_of(*arguments)
        return poison(own) if count == number + 1 else own

    monkeypatch.setattr(trainer, "training_losses", losses)


def nan_loss(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return terms | {"deepest": terms["deepest"] * float("nan")}


def nan_gradient(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A finite loss through a root at 0, where the slope is infinite."""
    return terms | {"deepest": terms["deepest"] + 0 * (0 * terms["deepest"]).sqrt()}


def test_memory_that_is_short_ends_a_run_in_one_line(
    tmp_path: Path, whole: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run")
    with monkeypatch.context() as patch:
        poisoned(patch, 5, lambda terms: torch.empty(2**55))  # two batches an epoch
        with pytest.raises(
            RunError, match=r"a step must fit in memory, got: .*allocate memory.*; free some and add --resume"
        ):
            trainer.train(config)
    trainer.train(config, resume=True)
    assert_same(config.out, whole[0])


def test_a_loss_that_is_not_finite_ends_a_run_where_it_happened(
    tmp_path: Path, whole: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run")
    with monkeypatch.context() as patch:
        poisoned(patch, 3, nan_loss)
        with pytest.raises(
            RunError, match=r"^epoch 2, step 2: the training loss must be finite, got nan in 'deepest'; lower lr"
        ):
            trainer.train(config)
    trainer.train(config, resume=True)
    assert_same(config.out, whole[0])


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes in the epoch's last step, whose loss is finite, so no later loss would show it."""
    poisoned(monkeypatch, 1, nan_gradient)
    with pytest.raises(RunError, match=r"epoch 1: the weights must be finite after the last step, got nan"):
        trainer.train(small(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("poison", [nan_loss, nan_gradient])
def test_a_step_that_is_not_finite_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Any
) -> None:
    """The step is counted. Weights, momentum, average and statistics are the same after it as before."""
    config = small(tmp_path / "run", on_nan="skip", epochs=2)
    undone, seen = guard.StepGuard.undone, []

    def watching(self: guard.StepGuard, losses: Any) -> bool:
        left_out = undone(self, losses)
        if left_out:
            now = {name: value.clone() for name, value in self.learner.tensors().items()}
            seen.append(all(torch.equal(now[name], before[0][name]) for name in now))
        return left_out

    def remembering(self: guard.StepGuard) -> None:
        remember(self)
        before[:] = [{name: value.clone() for name, value in self.learner.tensors().items()}]

    before: list[dict[str, torch.Tensor]] = []
    remember = guard.StepGuard.remember
    monkeypatch.setattr(guard.StepGuard, "undone", watching)
    monkeypatch.setattr(guard.StepGuard, "remember", remembering)
    poisoned(monkeypatch, 2, poison)
    trainer.train(config)
    rows, record = comparable(config.out)
    assert [row["skipped_steps"] for row in rows] == [0, 1]
    assert seen == [True]
    assert record["test"][-1]["nll"] < 100


def test_skipping_changes_nothing_where_all_is_finite_and_ends_where_nothing_is(
    tmp_path: Path, whole: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", on_nan="skip")
    trainer.train(config)
    assert_same(config.out, whole[0])
    losses_of = trainer.training_losses
    monkeypatch.setattr(trainer, "training_losses", lambda *arguments: nan_loss(losses_of(*arguments)))
    with pytest.raises(RunError, match="epoch 1: a step must have a finite loss and gradient, got none of 2"):
        trainer.train(small(tmp_path / "other", on_nan="skip"))


def test_a_process_that_dies_ends_the_other_in_one_line(tmp_path: Path) -> None:
    config = small(tmp_path / "run", devices=2, batch_size=16)
    alive, killed = faults.started_in_two(config, tmp_path, None, partial(faults.killed_in, 2))
    assert faults.exit_code(killed) == -signal.SIGKILL
    since = time.monotonic()
    alive.join(60)
    assert alive.exitcode == 2, f"still there after {time.monotonic() - since:.0f} s"
    assert "all 2 processes must live until the end, got one that is lost" in one_line(tmp_path / "output0")
    assert checkpoint.load(config.out / "checkpoints", "last")[1]["epoch"] == 1


def test_two_processes_end_as_one_with_the_same_batches(tmp_path: Path) -> None:
    """Two processes train over Gloo, with a cut on the way. Two that were stopped in the last epoch and went on end
    with the bits of two that were not.

    A single process takes their two batches in turn before each step, so that batch norm sees the same images. The
    running statistics take another course and are not compared.
    """
    settings = {"model": "resnet-kl", "train_size": 160, "test_size": 40, "batch_size": 16, "loss": {"beta": 0.2}}
    stopped, whole = (small(tmp_path / name, devices=2, **settings) for name in ("stopped", "whole"))
    interrupted = partial(faults.interrupted_in, 3)
    for config, fault, resume, code in (
        (stopped, interrupted, False, 130),
        (stopped, None, True, 0),
        (whole, None, False, 0),
    ):
        processes = faults.started_in_two(config, tmp_path, fault, fault, resume=resume)
        assert [faults.exit_code(each) for each in processes] == [code, code], (tmp_path / "output0").read_text()
    one = trainer.train(small(tmp_path / "one", accumulate=2, **settings))
    (ours, facts), (same, _), (theirs, others) = (
        checkpoint.load(folder / "checkpoints", "last") for folder in (stopped.out, whole.out, one)
    )
    assert ours.keys() == same.keys()
    assert all(torch.equal(value, same[name]) for name, value in ours.items())
    assert facts["plan"] == others["plan"]
    assert len(facts["cuts"]) == 1
    for name, value in ours.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    rows, record = comparable(stopped.out)
    others, _ = comparable(one)
    assert record["test_images"] == sum(map(sum, record["confusion"]))
    for row, other in zip(rows, others, strict=True):
        assert row["losses"] == pytest.approx(other["losses"], rel=1e-3)


def test_an_experiments_process_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "train_cell", faults.lost)
    assert cells.in_own_process(small(tmp_path / "run"), None, 1) == "the process ended with code -9"
