"""After training: early exit, cuts to a target, and exported files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from rkl.cli import main
from rkl.config import Config
from rkl.data import Dataset
from rkl.deploy import exit_report, export, prune
from rkl.network.model import ResNet, ResNetKL
from rkl.slimming import early_exit
from rkl.slimming.channels import channel_plan
from rkl.training import images, metrics
from rkl.training import train as trainer
from rkl.training.checkpoint import open_run

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    trainer.train(Config(folder, width=4, image_size=8, train_size=100, test_size=40, epochs=1, batch_size=32, lr=0.05))
    return folder


@pytest.fixture
def model() -> ResNetKL:
    torch.manual_seed(0)
    model = ResNetKL(3, 18, 8, 1, 8)
    with torch.no_grad():
        model(torch.randn(32, 1, 8, 8))
    return model.eval()


def test_compaction_gives_each_samples_own_result(model: ResNetKL) -> None:
    """A batch gives what its samples give one by one, and what a choice among all exits' logits gives."""
    images = torch.randn(24, 1, 8, 8)
    with torch.no_grad():
        every = model.forward_exits(images).logits
    thresholds = [float(logits.softmax(1).amax(1).quantile(0.6)) for logits in every[:3]]
    logits, exits = early_exit.early_exit(model, images, thresholds)
    assert set(exits.tolist()) == {0, 1, 2, 3}
    for i in range(len(images)):
        confident = [float(every[e][i].softmax(0).amax()) >= t for e, t in enumerate([*thresholds, 0.0])]
        assert int(exits[i]) == confident.index(True)
        torch.testing.assert_close(logits[i], every[int(exits[i])][i], rtol=1e-4, atol=1e-4)
        alone, exit = early_exit.early_exit(model, images[i : i + 1], thresholds)
        assert int(exit) == int(exits[i])
        torch.testing.assert_close(alone[0], logits[i], rtol=1e-4, atol=1e-4)


def test_unused_exits_cost_nothing(model: ResNetKL) -> None:
    called = []
    for stage, head in enumerate(model.exits):
        head.register_forward_hook(lambda *_, stage=stage: called.append(stage))
    early_exit.early_exit(model, torch.randn(4, 1, 8, 8), [early_exit.NEVER, 0.0, 0.0])
    assert called == [1]


def test_exit_costs_add_up_to_the_whole_model(model: ResNetKL) -> None:
    image = torch.zeros(1, 1, 8, 8)
    backbone, heads = early_exit.exit_costs(model, image)
    assert len(backbone) == len(heads) == 4
    assert sum(backbone) + heads[-1] == metrics.count_macs(model, image)
    # By hand: the deepest head is one linear layer from 64 channels to 3 classes.
    assert heads[-1] == 64 * 3


def test_operating_point_by_hand() -> None:
    """Four samples and two exits. The first exit is sure of two samples and right about one of them."""
    sure, unsure = [4.0, 0.0], [0.1, 0.0]
    exits = [torch.tensor([sure, sure, unsure, unsure]), torch.tensor([[0.0, 1], [0.0, 1], [0.0, 1], [1.0, 0]])]
    point = early_exit.operate(exits, torch.tensor([0, 1, 1, 1]), ([10, 100], [1, 2]), [0.9])
    assert point.shares == [0.5, 0.5]
    assert point.accuracy == 0.5
    assert point.macs == 10 + 1 + 0.5 * (100 + 2)
    never = early_exit.operate(exits, torch.tensor([0, 1, 1, 1]), ([10, 100], [1, 2]), [early_exit.NEVER])
    assert never.macs == 112


def test_calibration_meets_its_target() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (400,), generator=generator)
    hot = nn.functional.one_hot(labels, 4).float()
    exits = [gain * hot + torch.randn(400, 4, generator=generator) for gain in (1.0, 2.0, 4.0)]
    costs = ([10, 10, 10], [1, 1, 1])
    points = early_exit.frontier(exits, labels, costs)
    assert [p.macs for p in points] == sorted(p.macs for p in points)
    assert [p.accuracy for p in points] == sorted({p.accuracy for p in points}), "none costs more for nothing"
    by_accuracy = early_exit.calibrate(exits, labels, costs, accuracy=0.9)
    assert by_accuracy.accuracy >= 0.9
    assert all(p.accuracy < 0.9 for p in points if p.macs < by_accuracy.macs)
    by_compute = early_exit.calibrate(exits, labels, costs, macs=20)
    assert by_compute.macs <= 20
    assert all(p.macs > 20 for p in points if p.accuracy > by_compute.accuracy)
    with pytest.raises(ValueError, match="target accuracy must be at most"):
        early_exit.calibrate(exits, labels, costs, accuracy=1.1)
    with pytest.raises(ValueError, match="target macs must be at least"):
        early_exit.calibrate(exits, labels, costs, macs=5)


def test_the_deepest_exits_own_accuracy_is_within_reach(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the default target, and in reach even where rounding to single precision would put it above."""
    labels = torch.zeros(20, dtype=torch.int64)
    logits = torch.eye(10)[[0] * 11 + [1] * 9]
    monkeypatch.setattr(metrics, "collect_exits", lambda model, batches: ([logits] * 4, labels))
    record = exit_report.evaluate_early_exit(open_run(run))
    assert record["validation"]["accuracy"] == 11 / 20


def test_a_target_accuracy_is_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first exit would be cheaper, but is right about only half of the images."""
    labels = torch.zeros(20, dtype=torch.int64)
    first, deeper = (10 * torch.eye(10)[[0] * right + [1] * (20 - right)] for right in (11, 19))
    monkeypatch.setattr(metrics, "collect_exits", lambda model, batches: ([first, deeper, deeper, deeper], labels))
    record = exit_report.evaluate_early_exit(open_run(run), accuracy=0.9)
    assert record["validation"]["accuracy"] == 19 / 20


def test_thresholds_are_of_validation_images_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = open_run(run), images.load_data
    monkeypatch.setattr(exit_report, "throughput", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(exit_report, "plot_curve", lambda *_: None)
    first = exit_report.evaluate_early_exit(opened)

    def with_other_labels(config: Config) -> Dataset:
        data = real(config)
        return replace(data, test=replace(data.test, labels=torch.zeros_like(data.test.labels)))

    monkeypatch.setattr(images, "load_data", with_other_labels)
    again = exit_report.evaluate_early_exit(opened)
    assert (again["thresholds"], again["validation"]) == (first["thresholds"], first["validation"])
    assert again["test"] != first["test"]


def test_early_exit_is_measured_in_the_runs_precision(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training found its thresholds. In bfloat16 a probability near a threshold falls on the other side."""
    opened = open_run(run)
    costs = exit_report.exit_costs(opened.model.deploy(exits=True), torch.zeros(1, 1, 8, 8))
    monkeypatch.setattr(exit_report, "exit_costs", lambda *_: costs)  # counted, not measured
    with output_types(nn.Linear) as seen:
        exit_report.evaluate_early_exit(replace(opened, config=replace(opened.config, precision="bf16-mixed")))
    assert seen == {torch.bfloat16}


@contextmanager
def output_types(kind: type[nn.Module]) -> Iterator[set[torch.dtype]]:
    """The types that modules of this kind return in the block."""
    seen: set[torch.dtype] = set()
    hook = register_module_forward_hook(lambda m, _, y: seen.add(y.dtype) if isinstance(m, kind) else None)
    try:
        yield seen
    finally:
        hook.remove()


def test_early_exit_command(run: Path, capsys: pytest.CaptureFixture) -> None:
    main(["evaluate", str(run), "--early-exit", "--target-macs", "1"])
    record = json.loads((run / "early_exit.json").read_text())
    assert record["validation"]["macs"] <= record["deepest"]["macs"]
    assert sum(record["test"]["shares"]) == pytest.approx(1)
    assert f"{record['test']['accuracy']:.2%}" in capsys.readouterr().out
    assert (run / "plots" / "early_exit.png").stat().st_size > 1000


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_cut_to_macs(model: ResNetKL, share: float) -> None:
    image = torch.zeros(1, 1, 8, 8)
    cut = prune.cut_to_macs(model, image, share)
    assert metrics.count_macs(cut, image) <= share * metrics.count_macs(model, image)
    assert cut(image).shape == (1, 3)


def pretend(latency: Callable[[nn.Module], float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the clock by one that reads what the test says, since tests never assert speed."""
    monkeypatch.setattr(metrics, "measure_latencies", lambda models, images: [latency(model) for model in models])
    monkeypatch.setattr(metrics, "measure_latency", lambda model, images: latency(model))


def test_cut_to_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = ResNet(3, 18, 8, 1, 8).eval(), torch.zeros(1, 1, 8, 8)
    whole = metrics.count_parameters(model.deploy())
    pretend(lambda m: 10 * metrics.count_parameters(m) / whole, monkeypatch)
    assert metrics.count_parameters(prune.cut_to_latency(model, image, 6.0).deploy()) <= 0.6 * whole
    pretend(lambda m: 5.0, monkeypatch)
    with pytest.raises(ValueError, match="within reach"):
        prune.cut_to_latency(model, image, 4.0)
    pretend(lambda m: 7.0 if metrics.count_parameters(m) == whole else 5.0, monkeypatch)
    monkeypatch.setattr(metrics, "measure_latencies", lambda models, images: [5.0, 5.0])
    with pytest.raises(ValueError, match="makes the model faster"):
        prune.cut_to_latency(model, image, 6.0)


def test_a_latency_that_the_model_has_needs_no_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut of nothing measures faster than the model every other time, and is not accepted for that."""
    model, image = ResNet(3, 18, 8, 1, 8).eval(), torch.zeros(1, 1, 8, 8)
    pretend(lambda m: 5.0, monkeypatch)
    monkeypatch.setattr(metrics, "measure_latencies", lambda models, images: [5.0, 4.9])
    with pytest.raises(ValueError, match=r"target_latency_ms must be below the model's own 5\.00 ms, got 6\.0"):
        prune.cut_to_latency(model, image, 6.0)
    measured = iter([6.1])
    monkeypatch.setattr(metrics, "measure_latency", lambda model, images: next(measured, 5.9))
    with pytest.raises(ValueError, match=r"must need a cut, got 6\.0, which the model meets in some measurements"):
        prune.cut_to_latency(model, image, 6.0)


def test_prune_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["prune", str(run), "--out", str(tmp_path / "slim"), "--target-macs", "0.5", "--epochs", "1"])
    before, after = (open_run(folder).model for folder in (run, tmp_path / "slim"))
    image = torch.zeros(1, 1, 8, 8)
    assert metrics.count_macs(after, image) <= 0.5 * metrics.count_macs(before, image)
    assert channel_plan(after).keys() == channel_plan(before).keys()
    assert "after" in capsys.readouterr().out


def test_what_would_be_refused_after_the_work_is_refused_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A search for a latency takes minutes, and an export longer than a look at a word."""
    monkeypatch.setattr(prune, "cut_to_macs", lambda *_: pytest.fail("the model was cut"))
    (tmp_path / "file").write_text("")
    for out, said in (
        (run, "got one with a run in it; give another folder"),
        (tmp_path / "file", "must be a writable"),
    ):
        with pytest.raises(SystemExit):
            main(["prune", str(run), "--out", str(out), "--target-macs", "0.5"])
        assert said in capsys.readouterr().err
    monkeypatch.setattr(export, "export", lambda *_: pytest.fail("the model was exported"))
    with pytest.raises(SystemExit):
        main(["export", str(run), "--out", str(tmp_path), "--format", "torch", "onxx"])
    assert "'onxx'" in capsys.readouterr().err
    monkeypatch.setattr(export, "export", lambda _, name, __: (name, 0.0))
    main(["export", str(run), "--format", "torch", "torch"])
    assert capsys.readouterr().out == "torch: outputs equal the model's to 0.0e+00\n", "once"


def test_latencies_before_and_after_a_cut_are_measured_together(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The run's record is from another time, and perhaps from another machine."""
    before = Path(shutil.copytree(run, tmp_path / "before"))
    record = json.loads((before / "metrics.json").read_text())
    record["size"] |= {"latency_ms": 98765.0, "latency_batch": 3}
    (before / "metrics.json").write_text(json.dumps(record))
    main(["prune", str(before), "--out", str(tmp_path / "slim"), "--target-macs", "0.5", "--epochs", "1"])
    said = capsys.readouterr().out
    assert said.count(" ms for 16 ") == 2
    assert "98765" not in said


@pytest.mark.parametrize(("tested", "checkpoint"), [("last", "best"), ("best", "last")])
def test_accuracies_before_and_after_a_cut_are_told_with_their_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tested: str, checkpoint: str
) -> None:
    """The run was tested once, in another epoch than that of the checkpoint that is cut."""
    real, values = trainer.evaluate, iter((0.75, 0.5, 0.25))

    def getting_worse(*arguments: Any) -> list[metrics.ExitMetrics]:
        accuracy = next(values)
        return [exit | {"accuracy": accuracy} for exit in real(*arguments)]

    small = {"width": 4, "image_size": 8, "train_size": 100, "test_size": 40, "batch_size": 32, "prune_at": ()}
    config = Config(tmp_path / "run", epochs=2, exits=False, test_with=tested, **small)
    monkeypatch.setattr(trainer, "evaluate", getting_worse)
    trainer.train(config)
    record = json.loads((config.out / "metrics.json").read_text())
    epochs = {"best": 1, "last": 2}
    assert record["epoch"] == epochs[tested]
    capsys.readouterr()
    arguments = ["--out", str(tmp_path / "slim"), "--target-macs", "0.7", "--epochs", "1"]
    main(["prune", str(config.out), "--checkpoint", checkpoint, *arguments])
    before, after = (line for line in capsys.readouterr().out.splitlines() if " ms for 16 " in line)
    assert f"before, epoch {epochs[checkpoint]}" in before
    assert f" {[0.75, 0.5][epochs[checkpoint] - 1]:.2%} " in before
    assert f" {record['test'][-1]['accuracy']:.2%} (epoch {epochs[tested]})" in before
    assert "after, epoch 1" in after
    assert " 25.00% " in after
    assert "(epoch" not in after


def test_a_cut_run_trains_on_by_the_runs_own_recipe(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All settings stay, except the learning rate and those that prepared its cuts and its start."""
    opened, given = open_run(run), []
    own = {"weight_decay": 0.01, "mixup": 0.3, "loss": replace(opened.config.loss, beta=0.5, l1=0.2)}
    gone = {"warmup": 1.0, "prune_at": (0.5,), "prune_macs": 0.5, "weights": tmp_path, "epochs": 8}
    opened.config = replace(opened.config, **own | gone)
    monkeypatch.setattr(prune, "train", lambda config, start: given.append(config))
    prune.prune_run(opened, tmp_path / "slim", 0.7, None, 3)
    after = {"warmup": 0.0, "prune_at": (), "prune_macs": None, "weights": None, "epochs": 3, "out": tmp_path / "slim"}
    loss = replace(opened.config.loss, l1=0.0)
    assert given == [replace(opened.config, lr=opened.config.lr / 10, schedule="cosine", loss=loss, **after)]


def test_a_process_of_several_that_does_not_write_says_nothing_of_a_cut(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(prune, "train", lambda *_, **__: None)  # as it returns in such a process
    main(["prune", str(run), "--out", str(tmp_path / "slim"), "--target-macs", "0.5"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("error:.*LeafSpec:FutureWarning")  # PyTorch's, of its own code: it was between the lines
def test_export_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The command itself reads both files back and compares them. The test checks that they are whole."""
    main(["export", str(run), "--out", str(tmp_path)])
    program = torch.export.load(tmp_path / "model.pt2")
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("rkl.separable_conv2d") for name in called)
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), open_run(run).model(images), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "model.onnx").stat().st_size > 1000
    assert not list(tmp_path.glob(".*"))
    assert capsys.readouterr().out.count("equal the model's") == 2


def test_an_export_that_gives_something_else_is_no_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(model: nn.Module, image: torch.Tensor, file: Path) -> torch.Tensor:
        file.write_bytes(b"a program")
        return 1.001 * model(image)

    monkeypatch.setattr(export, "_torch", off)
    with pytest.raises(ValueError, match=r"model\.pt2: outputs must equal the model's to 1e-4, got a difference of 1"):
        export.export(open_run(run), "torch", tmp_path)
    assert not list(tmp_path.iterdir())
