"""What the commands say of a machine that lacks what they ask for: memory, GPUs, a compiler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_rkl_train import fails, tiny

from rkl.cli import main
from rkl.config import Config
from rkl.deploy import export, predict, prune
from rkl.terminal import device_named
from rkl.training import evaluation, learner
from rkl.training import train as trainer
from rkl.training.files import RunError

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return trainer.train(tiny(tmp_path_factory.mktemp("runs") / "run", epochs=1, prune_at=(), prune_ratio=0.2))


def of_torch(*_: object) -> None:
    torch.empty(2**55)


def of_numpy(*_: object) -> None:
    np.empty(2**55)


def of_a_gpu(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("short", [of_torch, of_numpy, of_a_gpu])
@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        (evaluation, "collect", ["evaluate"]),
        (predict, "predict", ["predict", "a.png"]),
        (prune, "prune_run", ["prune", "--out", "slim", "--target-macs", "0.5"]),
        (export, "export", ["export"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_memory_that_is_short_is_one_line_in_every_command(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, module, name, arguments, short
) -> None:
    command, *options = arguments
    monkeypatch.setattr(module, name, short)
    said = fails([command, str(run), *options], capsys)
    assert said.startswith(f"rkl: {command} must fit in memory, got: ")
    assert said.endswith("; free some and run the command again")


def test_other_errors_keep_their_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are faults of the program, and the traceback tells where."""

    def faulty(*_: object) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(evaluation, "collect", faulty)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["evaluate", str(run)])


@pytest.mark.parametrize(
    ("gpus", "taken", "refused"),
    [(0, ["cpu"], ["cuda", "cuda:0", "tpu", "cpu:x"]), (2, ["cpu", "cuda", "cuda:1"], ["cuda:2", "cuda:x", "cuda:-1"])],
)
def test_a_device_is_one_that_there_is(
    monkeypatch: pytest.MonkeyPatch, gpus: int, taken: list[str], refused: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert [device_named(name) for name in taken] == taken
    for name in refused:
        with pytest.raises(ValueError, match=f"device must be cpu, or cuda where there is a GPU, got '{name}'"):
            device_named(name)


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="devices must be at most the 2 GPUs, got 3"):
        learner.make_fabric(Config(devices=3))


def test_a_network_that_cannot_be_compiled_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no C++ compiler."""

    def without_a_compiler(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("backend='inductor' raised:\nno working C++ compiler found")

    monkeypatch.setattr(trainer, "outputs", without_a_compiler)
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    with pytest.raises(
        RunError, match=r"torch.compile can use, got: .*no working C\+\+ compiler.*; set compile to false$"
    ):
        trainer.train(tiny(tmp_path / "run", compile=True))
    assert not (tmp_path / "run").exists()
