"""What a recipe can ask of the trainer, and what a cut leaves as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import forks
import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision.amp import MixedPrecision
from test_rkl_train import fails
from torch import nn

import rkl_kernels as rk
from rkl.cli import COMMANDS, EXAMPLES, Experiments, Predict, main
from rkl.config import MOST_L1, Config, to_plain
from rkl.data import class_weights
from rkl.distill import gamma_l1, gammas, training_losses
from rkl.network.blocks import MultiScaleDepthwise
from rkl.network.model import ResNet, ResNetKL
from rkl.slimming import pruning
from rkl.slimming.channels import channel_plan
from rkl.terminal import parse
from rkl.train_options import read_options
from rkl.training import checkpoint, report
from rkl.training import train as trainer
from rkl.training.evaluation import batch_size_of, evaluation_batches
from rkl.training.guard import check_splits
from rkl.training.learner import Learner, make_fabric, parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")

TINY = Config(width=4, image_size=8, train_size=120, test_size=40, epochs=2, batch_size=16, lr=0.05, prune_at=())


def learner_of(config: Config, **fabric: object) -> Learner:
    data = trainer.load_data(config)
    return Learner(config, data, Fabric(accelerator="cpu", devices=1, **fabric) if fabric else make_fabric(config))


def test_norms_biases_and_depthwise_filters_do_not_decay() -> None:
    model = ResNetKL(3, 18, 4, 1, 8)
    decaying, spared = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decaying["params"]) + len(spared["params"]) == len(list(model.parameters()))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all(names[p].endswith(("conv.weight", "pointwise.weight", "fc.weight")) for p in decaying["params"])
    assert all("depthwise" in names[p] or p.ndim == 1 for p in spared["params"])
    assert names[decaying["params"][0]] == "stem.conv.weight", "one channel in, but dense"
    assert parameter_groups(model, 0.1, "all")[1]["weight_decay"] == 0.1


def test_depthwise_filters_of_one_channel_do_not_decay_either() -> None:
    """A cut may leave a single channel. A run that goes on after it must decay what it decayed before."""
    for layer in (rk.DepthwiseConv2d(1, 3), MultiScaleDepthwise(1, (3, 5), 1)):
        decaying, _ = parameter_groups(nn.Sequential(layer, nn.Conv2d(1, 4, 1)), 0.1)
        assert [tuple(p.shape) for p in decaying["params"]] == [(4, 1, 1, 1)]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradients_that_rank_channels(weighted: bool) -> None:
    """They are the gradients of the training loss, whatever was drawn before. None is left for the next step."""
    config = replace(
        TINY, data="digits-lt", imbalance=20.0, train_size=None, importance="taylor", class_weights=weighted
    )
    learner, data = learner_of(config), trainer.load_data(config)
    learner.wrap()
    statistics = [buffer.clone() for buffer in learner.model.buffers()]
    trainer.taylor_gradients(config, learner, data, 1)
    kept = zip(learner.model.buffers(), statistics, strict=True)
    assert all(torch.equal(buffer, before) for buffer, before in kept), "a look at the loss is no training"
    found = {name: p.grad.clone() for name, p in learner.model.named_parameters()}
    learner.optimizer.zero_grad()
    learner.model.train()
    balance = class_weights(data.train, data.num_classes) if weighted else None
    batches = trainer.training_batches(config, data, 1, drop_last=True)
    for (images, labels), _ in zip(batches, range(trainer.TAYLOR_BATCHES), strict=False):
        losses = training_losses(trainer.outputs(learner.model(images)), labels, config.loss, balance)
        torch.stack(list(losses.values())).sum().backward()
    for name, parameter in learner.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
    learner.prune(next(iter(trainer.training_batches(config, data, 1)))[0], 0.3)
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_dropout_draws_the_same_whatever_came_before() -> None:
    config = replace(TINY, model="vgg", width=8, image_size=32, importance="taylor")
    data, found = trainer.load_data(config), []
    for before in range(2):
        learner = learner_of(config)
        torch.rand(before)
        trainer.taylor_gradients(config, learner, data, 1)
        found.append([parameter.grad for parameter in learner.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_fp16_on_a_cpu_is_refused() -> None:
    """Fabric would train in bfloat16 while the record would say float16."""
    with pytest.raises(ValueError, match="precision must be 32-true or bf16-mixed on a CPU, got '16-mixed'"):
        make_fabric(replace(TINY, precision="16-mixed"))


@pytest.mark.parametrize("name", ["shufflenet"])
def test_a_network_that_cannot_be_cut_is_refused_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    config = replace(TINY, out=tmp_path / "run", model=name, width=8, image_size=16, prune_at=(0.5,))
    with pytest.raises(ValueError, match=f"prune_at must be empty for {name}, whose channels"):
        trainer.train(config)
    assert not config.out.exists()
    run = trainer.train(replace(config, out=tmp_path / "whole", prune_at=()))
    capsys.readouterr()
    arguments = ["prune", str(run), "--target-macs", "0.5", "--out", str(config.out)]
    assert f"run must be of another network than {name}, whose channels" in fails(arguments, capsys)
    assert not config.out.exists()


def test_a_share_that_no_cut_leaves_is_refused_before_it_trains(tmp_path: Path) -> None:
    """The message names the least share that is possible, and a run with that share trains."""
    config = replace(TINY, out=tmp_path / "run", model="resnet", epochs=4, prune_at=(0.5, 0.75), prune_macs=0.001)
    with pytest.raises(ValueError, match=r"prune_macs must be at least 0\.\d+, which is as .*, got 0.001") as refused:
        trainer.train(config)
    assert not config.out.exists()
    least = float(str(refused.value).split("at least ")[1].split(",")[0])
    with pytest.raises(ValueError, match=f"prune_macs must be at least {least}, "):
        trainer.train(replace(config, prune_macs=least - 0.002))
    record = json.loads((trainer.train(replace(config, prune_macs=least)) / "metrics.json").read_text())
    assert len(record["cuts"]) == 2
    assert record["cuts"][-1]["after"]["macs"] <= least * record["cuts"][0]["before"]["macs"]


def test_a_network_without_norms_has_no_l1_term() -> None:
    assert gamma_l1(nn.Conv2d(3, 4, 1)) == 0.0


def test_names_of_classes_with_dollar_signs(tmp_path: Path, no_plots: pytest.MonkeyPatch) -> None:
    no_plots.undo()
    report.plot_confusion([[3, 1], [0, 4]], ["$5_$10", "$x_{$"], "folder:$x_{$: test", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_names_of_classes_that_the_font_lacks_are_boxes_alone(tmp_path: Path, no_plots: pytest.MonkeyPatch) -> None:
    """matplotlib warned of each letter, with a line of this package's code, at the end of each run."""
    no_plots.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.plot_confusion([[3, 1], [0, 4]], ["猫", "犬"], "test", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_curves_of_one_epoch_show(tmp_path: Path, no_plots: pytest.MonkeyPatch) -> None:
    no_plots.undo()
    pages = []
    for accuracy, loss in ((0.05, 2.0), (0.1, 2.0), (0.1, 2.5)):
        row = {"epoch": 1, "val": [{"accuracy": accuracy}], "losses": {"deepest": loss, "heads": 1.0, "total": 9.0}}
        report._plot_curves([row], {"cuts": []}, tmp_path / "curves.png")
        pages.append((tmp_path / "curves.png").read_bytes())
    assert len(set(pages)) == 3


def test_every_process_has_a_batch_to_evaluate() -> None:
    """This holds for few images too. With fewer images than processes the run is refused."""
    data = trainer.load_data(TINY)
    for images in range(3, 40):
        split = data.val.select(torch.arange(images) % len(data.val))
        for world in (2, 3):
            size = batch_size_of(images, world)
            counts = [
                sum(len(y) for _, y in evaluation_batches(split, data, size, rank, world)) for rank in range(world)
            ]
            assert sum(counts) == images
            assert min(counts) > 0
    with pytest.raises(ValueError, match=f"devices must be at most the {len(data.val)} val images, got 13"):
        check_splits(replace(TINY, devices=13), data)


def gammas_before_the_cut(tmp_path: Path, l1: float | None, **settings: object) -> torch.Tensor:
    """The backbone's gammas just before the cut, where the run is stopped."""
    config = Config(
        tmp_path / str(l1),
        model="resnet",
        width=8,
        image_size=8,
        prune_at=(0.75,),
        loss=replace(TINY.loss, l1=l1),
        **settings,
    )
    found = []

    def stopping(config: Config, learner: Learner, *rest: object) -> dict:
        blocks = [block.branch for stage in learner.model.stages for block in stage]
        found.append(torch.cat([gamma.detach() for block in blocks for gamma in gammas(block)]))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(trainer, "cut", stopping)
        trainer.train(config)
    return found[0]


def test_l1_spreads_the_gammas_where_it_has_the_way(tmp_path: Path) -> None:
    spreads = []
    for l1 in (0.025, 2.5e-5):  # they move a gamma by up to 1 and 0.001 before the cut
        values = gammas_before_the_cut(tmp_path, l1, epochs=4, batch_size=16, lr=0.05, train_size=600)
        spreads.append(float(values.std() / values.mean()))
    assert spreads[0] > 1.5 * spreads[1]


def test_l1_leaves_a_short_run_its_network(tmp_path: Path) -> None:
    """In 24 steps at this rate a lambda of 1 would bring a gamma to 0, and no loss could hold it against that."""
    assert gammas_before_the_cut(tmp_path, None, epochs=8, batch_size=256, lr=0.01).mean() > 0.9


def test_l1_acts_until_the_last_cut_and_only_for_cuts() -> None:
    kl = Config(epochs=50)
    assert kl.cut_epochs == [4, 8, 12]
    way = 12 * 100 * kl.lr / (1 - kl.momentum)
    assert kl.l1_at(0, 100) == MOST_L1 < 1 / way  # few steps: no more than the loss can hold against
    way = 12 * 1000 * kl.lr / (1 - kl.momentum)
    assert [kl.l1_at(epoch, 1000) * way for epoch in (0, 11, 12)] == pytest.approx([1.0, 1.0, 0.0])
    plain = Config(model="resnet")
    assert (plain.cut_epochs, plain.l1_at(0, 100)) == ([], 0.0)
    assert replace(plain, loss=replace(plain.loss, l1=0.1)).l1_at(49, 100) == 0.1


def test_a_cut_keeps_channels_last_and_ranks_by_taylor_too(tmp_path: Path) -> None:
    config = replace(TINY, out=tmp_path, width=16, prune_at=(0.5,), importance="taylor", model="resnet-kl")
    learner = learner_of(config)
    data = trainer.load_data(config)
    trainer.taylor_gradients(config, learner, data, 0)
    norm = learner.model.stages[0][0].branch[0].norm
    with torch.no_grad():  # a channel without gradients is cut first
        conv = learner.model.stages[0][0].branch[0].conv
        for weight in (norm.weight, norm.bias, conv.pointwise.weight):
            weight.grad[3] = 0
    cut = pruning.plan_cut(learner.model, torch.zeros(2, 1, 8, 8), 0.2, "taylor")
    assert 3 not in cut["stages.0.0.branch.0.norm.weight"][0].tolist()
    learner.prune(torch.zeros(2, 1, 8, 8), 0.2)
    images = [p for p in learner.model.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in images)


def test_the_gradient_scaler_goes_on_where_it_was(tmp_path: Path) -> None:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    learner = learner_of(replace(TINY, out=tmp_path), plugins=precision)
    learner.wrap()
    loss = learner.wrapped(torch.randn(4, 1, 8, 8)).logits[-1].square().mean()
    learner.fabric.backward(loss)
    before = learner.model.stem.norm.weight.grad.clone()
    from rkl.distill import add_l1_gradient

    add_l1_gradient(learner.model, 0.5, learner.scaler.scale(torch.ones(())))
    assert torch.allclose(learner.model.stem.norm.weight.grad - before, torch.full((4,), 0.5 * 8.0))
    learner.step(0.01, 0.0)
    facts = learner.facts() | {"epoch": 1, "config": to_plain(learner.config)}
    checkpoint.save(tmp_path, "last", learner.tensors(), facts)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    other = learner_of(replace(TINY, out=tmp_path), plugins=precision)
    other.restore(tmp_path)
    assert other.scaler.state_dict() == learner.scaler.state_dict()
    assert other.scaler.get_scale() == 8.0


def test_early_stopping_and_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation is never better than in the first epoch."""
    real, calls = trainer.evaluate, []

    def getting_worse(*arguments: object) -> list:
        calls.append(None)
        return [exit | {"accuracy": 1 / len(calls)} for exit in real(*arguments)]

    monkeypatch.setattr(trainer, "evaluate", getting_worse)
    config = replace(TINY, out=tmp_path / "run", epochs=9, patience=2, test_with="best", model="resnet")
    record = json.loads((trainer.train(config) / "metrics.json").read_text())
    assert (record["epochs"], record["epoch"], record["tested"]) == (3, 1, "best")
    rows = (config.out / "log.jsonl").read_text().splitlines()
    trainer.train(config, resume=True)
    assert (config.out / "log.jsonl").read_text().splitlines() == rows, "a stopped run stays stopped"
    late = replace(config, out=tmp_path / "late", epochs=9, patience=1, prune_at=(0.5,))
    record = json.loads((trainer.train(late) / "metrics.json").read_text())
    assert ([cut["epoch"] for cut in record["cuts"]], record["epochs"], record["epoch"]) == ([4], 6, 5)


def test_fine_tuning_starts_from_another_runs_weights(tmp_path: Path) -> None:
    """A pruned model of ten classes is tuned for two. It keeps its channels and averaged values except in the heads."""
    first = replace(TINY, out=tmp_path / "first", width=8, prune_at=(0.5,), prune_ratio=0.3, ema=0.9)
    trainer.train(first)
    wanted = checkpoint.open_run(first.out).model
    model = ResNetKL(2, 18, 8, 1, 8)
    head = model.fc.weight[:, :3].detach().clone()
    tuned = checkpoint.start_from(model, first.out, 8, 1, ["a", "b"])
    plan, own = channel_plan(wanted), channel_plan(tuned)
    assert {name for name in plan if plan[name] != own[name]} == {"fc", *(f"exits.{i}.fc" for i in range(3))}
    for name, value in tuned.state_dict().items():
        if ".fc." not in f".{name}":
            assert torch.equal(value, wanted.state_dict()[name]), name
    assert torch.equal(tuned.fc.weight[:, :3], head), "new classes keep the new head's values"
    with pytest.raises(checkpoint.RunError, match="weights must be of this configuration's model"):
        checkpoint.start_from(ResNet(2, 18, 8, 1, 8), first.out, 8, 1, ["a", "b"])
    with pytest.raises(checkpoint.RunError, match="weights must be of a network of the same width, got 8 for width 16"):
        checkpoint.start_from(ResNetKL(2, 18, 16, 1, 8), first.out, 16, 1, ["a", "b"])
    with pytest.raises(checkpoint.RunError, match="weights must be of images of 3 channels, as the data has, got 1"):
        checkpoint.start_from(ResNetKL(2, 18, 8, 3, 8), first.out, 8, 3, ["a", "b"])
    for classes in (list("0123456789"), list("abcdefghij")):  # its own ten, and ten others
        model = ResNetKL(10, 18, 8, 1, 8)
        head = model.fc.weight[:, :3].detach().clone()
        tuned = checkpoint.start_from(model, first.out, 8, 1, classes)
        assert torch.equal(tuned.fc.weight, wanted.fc.weight) == (classes[0] == "0")
        assert torch.equal(tuned.fc.weight[:, :3], head) == (classes[0] == "a")
    second = replace(TINY, out=tmp_path / "second", width=8, weights=first.out, epochs=1)
    assert json.loads((trainer.train(second) / "metrics.json").read_text())["plan"] == plan


def test_a_compiled_model_trains_as_an_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is traced by torch.compile and run eagerly, since a compiler's own changes are not tested here."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend="eager"))
    options = {"train_size": 60, "epochs": 1, "model": "resnet", "activation": "trelu"}
    records = []
    for name, compiled in (("eager", False), ("compiled", True)):
        folder = trainer.train(replace(TINY, out=tmp_path / name, compile=compiled, **options))
        records.append(json.loads((folder / "metrics.json").read_text())["training_loss"])
    assert records[0] == pytest.approx(records[1], rel=1e-4)


def test_version_and_help(capsys: pytest.CaptureFixture) -> None:
    main(["--version"])
    assert capsys.readouterr().out.startswith("rkl 0.")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("--recipe", "--config", "--resume", "--loss.x", "--epochs"))
    assert all(f" {group} options " in said for group in ("data", "model", "training", "pruning", "machine", "loss"))


def test_a_reader_that_closes_the_pipe_is_no_error() -> None:
    """`rkl train --help | head` ends without a word. Here the pipe is closed before the first line."""
    command = [sys.executable, "-m", "rkl", "train", "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_output_is_no_error() -> None:
    command = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-m", "rkl", "info", "--models"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_usage_names_every_command_once_and_an_unknown_one_gets_a_hint(capsys: pytest.CaptureFixture) -> None:
    main([])
    said = capsys.readouterr().out
    assert all(said.count(f"\n  {name:<12} ") == 1 for name in COMMANDS)
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "got 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_every_example_of_the_usage_is_a_command_that_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.yaml").write_text("epochs: 3\n")  # to --resume
    monkeypatch.chdir(tmp_path)
    for line in EXAMPLES.splitlines()[1:]:
        name, *arguments = line.partition("(")[0].split()[1:]
        if name == "train":
            read_options(arguments)
        else:
            parse({"predict": Predict, "experiments": Experiments}[name], arguments)


@pytest.mark.parametrize(("package", "extra"), [("tyro", "train"), ("onnxruntime", "export")])
def test_a_missing_package_is_one_sentence(package: str, extra: str) -> None:
    """Without the extra the sentence comes before any command, or in the command that needs it."""
    ask = {
        "tyro": "from rkl.__main__ import main; main()",
        "onnxruntime": "from rkl.cli import *; COMMANDS['info'] = lambda _: __import__('onnxruntime'); main(['info'])",
    }
    code = f"import sys; sys.modules[{package!r}] = None; {ask[package]}"
    done = forks.run(code)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert f"the package {package!r} must be installed" in line
    assert f"resnet-kl[{extra}]" in line
