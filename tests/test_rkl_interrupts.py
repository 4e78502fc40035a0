"""Ctrl-C: each command says in one line what is true of it, and leaves nothing half written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_rkl_train import tiny

import rkl_kernels
from rkl.cli import COMMANDS, main
from rkl.paper import experiments, tables
from rkl.paper.experiments import experiment
from rkl.training import checkpoint
from rkl.training import train as trainer
from rkl_kernels import bench

AGAIN = "run the command again"
INTERRUPTED = {
    "train": (trainer, "train", "train goes on from the last whole epoch with --resume"),
    "experiments": (experiments, "run", "finished runs and whole epochs are kept, and the same command goes on"),
    "evaluate": (checkpoint, "open_run", f"no file is half written; {AGAIN}"),
    "report": (tables, "write", f"no file is half written; {AGAIN}"),
    "predict": (checkpoint, "open_run", f"answers printed so far stand; {AGAIN} for the others"),
    "export": (checkpoint, "open_run", f"files named so far are whole; {AGAIN} for the others"),
    "prune": (checkpoint, "open_run", AGAIN),
    "bench": (bench, "four_lines", AGAIN),
    "info": (rkl_kernels, "backends", AGAIN),
}
ARGUMENTS = {
    "experiments": ["table5", "--out", "out"],
    "evaluate": ["run"],
    "report": ["out"],
    "predict": ["run", "a.png"],
    "export": ["run"],
    "prune": ["run", "--out", "out"],
}


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that Ctrl-C stops."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 130
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_what_is_true_of_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, name, words = INTERRUPTED[command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, name, stop)
    assert said([command, *ARGUMENTS.get(command, [])], capsys) == f"stopped; {words}"
    assert not list(tmp_path.iterdir())


def test_a_cut_run_that_was_stopped_goes_on_by_the_command_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rkl prune` itself would refuse the folder from its first checkpoint on."""
    run = trainer.train(tiny(tmp_path / "run", epochs=2, width=8))
    out = tmp_path / "cut to half"
    command = ["prune", str(run), "--out", str(out), "--target-macs", "0.7", "--epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.RunLog, "opened", stop)
        assert said(command, capsys) == f"stopped; {AGAIN}"
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_epoch", stop)
        assert said(command, capsys) == f"stopped; rkl train --resume --out '{out}' goes on with the cut run"
    main(["train", "--resume", "--out", str(out)])
    assert (out / "metrics.json").exists()


def test_experiments_end_with_their_cells_and_go_on(tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to all processes of a command. Cells were named as failed then, and an interrupt of the
    first process alone waited for their last epoch."""
    (tmp_path / "long.yaml").write_text("epochs: 100000\nimage_size: 16\n")
    table = ["table5", "--data", "digits", "--scale", "smoke", "--rows", "ResNet", "ResNet-KL", "--jobs", "1"]
    options = ["--config", str(tmp_path / "long.yaml"), "--out", str(tmp_path)]
    run = experiment("table5", "smoke", tmp_path, data="digits").folder("ResNet", 0)
    for to_all in (True, False):
        process = subprocess.Popen(
            [sys.executable, "-m", "rkl", "experiments", *table, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            before, deadline = saved(run), time.monotonic() + 300
            while saved(run) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
            out, told = process.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert told == "stopped; finished runs and whole epochs are kept, and the same command goes on\n"
        assert out == "Table V on digits: 2 runs, 0 done before\n"
        assert process.returncode == 130
        checkpoint.open_run(run)


def saved(run: Path) -> int | None:
    """When the run's last checkpoint was saved."""
    record = run / "checkpoints" / "last.json"
    return record.stat().st_mtime_ns if record.exists() else None


def test_ctrl_c_while_the_command_is_read(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise KeyboardInterrupt")
    ran = subprocess.run(
        [sys.executable, "-m", "rkl", "info"], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True
    )
    assert (ran.returncode, ran.stderr) == (130, b"stopped\n")
