"""The trainer and the command line, on a model of four channels and a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rkl.cli import main
from rkl.config import Config, from_plain, read_yaml, to_plain
from rkl.distill import LossWeights
from rkl.training import checkpoint
from rkl.training import train as trainer

TINY = Config(
    width=4,
    image_size=8,
    train_size=120,
    test_size=40,
    epochs=3,
    batch_size=32,
    lr=0.05,
    ema=0.9,
    prune_at=(0.3,),
    prune_ratio=0.3,
    loss=LossWeights(beta=0.2),
)


pytestmark = pytest.mark.usefixtures("no_plots")

QUICK = ("--recipe", "smoke", "--width", "4", "--epochs", "1")


def tiny(out: Path, **changes: object) -> Config:
    return from_plain(changes | {"out": str(out)}, TINY)


def plain(out: Path, **changes: object) -> Config:
    """A plain ResNet, for what does not depend on the network: it trains in a third of the time."""
    return from_plain(changes | {"out": str(out)}, replace(TINY, model="resnet", loss=LossWeights()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return trainer.train(tiny(tmp_path_factory.mktemp("runs") / "whole"))


def comparable(folder: Path) -> tuple[list, dict]:
    """Log and metrics of a run, without values that depend on the clock or the machine's memory."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    record = json.loads((folder / "metrics.json").read_text())
    timed = {"seconds", "data_share", "peak_memory_bytes", "test_looked_at", "latency_ms"}

    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in timed}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(rows), strip(record)


def test_a_run_leaves_its_records(run: Path) -> None:
    assert read_yaml(run / "config.yaml") == tiny(run)
    rows, record = comparable(run)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert set(rows[0]["losses"]) == {"deepest", "heads", "logits", "feature", "l1", "total"}
    assert sum(v for k, v in rows[0]["losses"].items() if k != "total") == pytest.approx(rows[0]["losses"]["total"])
    assert [set(exit) for exit in record["test"]] == [{"accuracy", "recall", "f1", "nll", "ece"}] * 4
    assert sum(map(sum, record["confusion"])) == record["test_images"]
    (cut,) = record["cuts"]
    assert cut["after"]["parameters"] < cut["before"]["parameters"]
    assert cut["after"]["macs"] < cut["before"]["macs"]
    assert record["size"]["parameters"] == cut["after"]["parameters"] > record["size"]["deployed_parameters"]
    assert record["best"]["epoch"] > cut["epoch"]
    assert (record["tested"], record["epoch"]) == ("last", 3)
    assert len(record["thresholds"]) == 3
    assert all((run / name).stat().st_size > 1000 for name in ("plots/curves.png", "plots/confusion.png"))
    assert list((run / "tensorboard").iterdir())
    assert f"{record['test'][-1]['accuracy']:.2%}" in (run / "report.md").read_text()
    assert not list(run.rglob("*.partial"))


def train_interrupted(config: Config, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    """Train until Ctrl-C in the epoch after ``stop_after``."""
    train_epoch = trainer.train_epoch

    def interrupted(*arguments: object) -> dict:
        row = train_epoch(*arguments)
        if row["epoch"] > stop_after:
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(trainer, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config)
    monkeypatch.undo()


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """The run stops in the epoch after ``stop_after``, before or after the cut."""
    config = tiny(tmp_path / "run")
    train_interrupted(config, monkeypatch, stop_after)
    trainer.train(config, resume=True)
    assert comparable(config.out) == comparable(run)
    for name in ("last", "best"):
        ours, theirs = (checkpoint.load(folder / "checkpoints", name)[0] for folder in (config.out, run))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_cuts_reach_their_share_of_the_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cuts to half the multiply-accumulates. The run stops between them; the second cut still knows the start."""
    plain = {"model": "resnet", "loss": {"beta": LossWeights().beta}}
    config = tiny(tmp_path / "run", width=8, prune_at=(0.3, 0.7), prune_macs=0.5, **plain)
    train_interrupted(config, monkeypatch, stop_after=2)
    trainer.train(config, resume=True)
    _, record = comparable(config.out)
    whole = record["cuts"][0]["before"]["macs"]
    assert [cut["after"]["macs"] <= whole * 0.5 ** (i / 2) for i, cut in enumerate(record["cuts"], 1)] == [True, True]
    assert record["size"]["macs"] > 0.35 * whole, "cut much further than it needs"


@pytest.mark.parametrize("split", ["test", "val"])
def test_evaluate_gives_what_the_run_recorded(run: Path, capsys: pytest.CaptureFixture, split: str) -> None:
    main(["evaluate", str(run), "--split", split])
    printed = capsys.readouterr().out
    for values in json.loads((run / "metrics.json").read_text())[split]:
        assert f"{values['nll']:.4f}" in printed


def test_predict_names_classes_probabilities_and_exit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("RGB", (20, 30), (90, 10, 200)).save(tmp_path / "a.png")
    main(["predict", str(run), str(tmp_path / "a.png"), "--confidence", "0"])
    assert "left at exit 1 of 4" in (first := capsys.readouterr().out)
    assert first.count("%") == 5
    main(["predict", str(run), str(tmp_path / "a.png"), "--confidence", "1"])
    assert "left at exit 4 of 4" in capsys.readouterr().out


def test_info_lists_what_there_is(capsys: pytest.CaptureFixture) -> None:
    main(["info"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("resnet-kl", "digits", "reference"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1e-3", {"lr": 0.001}),
        ("image_size: '8'", {"image_size": 8}),
        ("cutmix: 'no'", {"cutmix": False}),
        ("prune_at: [0.5]", {"prune_at": (0.5,)}),
        ("epochs: many", "epochs must be a valid integer, .*got 'many'"),
        ("loss: 3", "loss must be .*got 3"),
        ("loss: {x: much}", "loss.x must be a valid number, .*got 'much'"),
        ("loss: {y: 1}", "keys of loss must be loss weights, got 'y'"),
        ("augment: lots", "augment must be 'none', 'standard' or 'trivial', got 'lots'"),
        ("- 1", "must be a mapping"),
    ],
)
def test_yaml_values_become_what_their_fields_are(tmp_path: Path, text: str, expected: dict | str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    if isinstance(expected, dict):
        assert {key: getattr(read_yaml(tmp_path / "a.yaml"), key) for key in expected} == expected
    else:
        with pytest.raises(ValueError, match=rf"a\.yaml: .*{expected}"):
            read_yaml(tmp_path / "a.yaml")


def test_the_loss_weights_and_yaml_reach_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("epochs: 7\nloss: {x: 0.5}\nscales: [3, 5]\n")
    config = read_yaml(tmp_path / "a.yaml")
    assert (config.epochs, config.loss.x, config.loss.beta, config.scales) == (7, 0.5, LossWeights().beta, (3, 5))
    assert from_plain(to_plain(config)) == config


def fails(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_bad_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(image)
    (tmp_path / "torn.png").write_bytes(image.read_bytes()[:40])
    (tmp_path / "bad.yaml").write_text("epoch: 3\n")
    (tmp_path / "latin.yaml").write_bytes(b"data: caf\xe9\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "two.yaml").write_text("devices: 2\n")
    (tmp_path / "own.yaml").write_text("epochs: 1\ndata: digits\n")
    (tmp_path / "vgg.yaml").write_text("model: vgg\n")
    experiments = ["experiments", "table5", "--data", "digits", "--scale", "smoke", "--out", str(tmp_path / "r")]
    mobilenet = ["train", "--out", str(tmp_path / "r"), "--model", "mobilenet"]
    for arguments, expected in [
        (["evaluate", str(tmp_path)], "must be the folder of a run"),
        (["predict", str(run), str(tmp_path / "none.png")], "none.png: no such file"),
        (["predict", str(run), str(tmp_path / "torn.png")], "torn.png: must be a readable image"),
        (["predict", str(run), str(image), "--confidence", "7"], "confidence must be between 0 and 1, got 7"),
        (["predict", str(run), str(image), "--confidence", "nan"], "confidence must be between 0 and 1, got nan"),
        (["predict", str(run), str(image), "--device", "tpu"], "device must be cpu, or cuda where there is a GPU"),
        (["evaluate", str(run), "--target-accuracy", "0.5"], "target_accuracy must go with --early-exit"),
        (["train", "--config", str(tmp_path / "latin.yaml")], "latin.yaml: the configuration must be YAML"),
        (["train", "--out", str(tmp_path / "r"), "--train-size", "10"], "must leave some to validate on"),
        (["train", "--out", str(tmp_path / "r"), "--accumulate", "99"], "must be at most the 1295 training images"),
        (["train", "--out", str(tmp_path / "r"), "--weights", str(tmp_path)], "last.json: a checkpoint must be there"),
        (["train", "--cutout", "-5"], "cutout must be at least 0, got -5"),
        (["train", "--mixup", "1e300"], "mixup must be 0 or between 1e-30 and 1e30, got 1e+300"),
        (["train", "--loss.temperature", "1e200"], "temperature must be between 1e-100 and 1e100, got 1e+200"),
        (["train", "--warmup", "-1"], "warmup must be at least 0, got -1"),
        (["train", "--test-with", "best", "--val-fraction", "0"], "test_with must go with a val_fraction above 0"),
        (["predict", str(run), str(image), "--checkpoint", "first"], "first.json: a checkpoint must be there"),
        (["train", "--config", str(tmp_path / "bad.yaml")], "bad.yaml: keys must be fields"),
        (["train", "--recipe", "best"], "recipe must be one of paper, strong, smoke, got 'best'"),
        (["train", "--out", str(run)], "add --resume"),
        (["train", "--out", str(run), "--resume", "--epochs", "9"], "must keep its settings, got"),
        (["train", "--out", str(tmp_path / "file" / "run")], "out must be a writable folder"),
        (["train", "--out", str(tmp_path / "r"), "--model", "vgg99"], "model must be one of"),
        ([*mobilenet, "--depth", "50"], "depth must be left out for mobilenet, which has no such option, got 50"),
        ([*mobilenet, "--exits", "True"], "exits must be left out for mobilenet, which has no such option, got True"),
        ([*mobilenet, "--scales", "3", "9"], "scales must be left out for mobilenet"),
        ([*mobilenet, "--exit-gate", "none"], "exit_gate must be left out for mobilenet"),
        (["train", "--out", str(tmp_path / "r"), "--data", "nothing"], "data must be"),
        (["train", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["train", "--epochs", "few"], "--epochs"),
        (["train", "--speed", "9"], "--speed"),
        (["train", "--loss.x", "2"], "x must be between 0 and 1, got 2"),
        (["train", "--seed", "99999999999999"], "seed must be at least 0 and below 2^32, got 99999999999999"),
        (["train", "--image-size", "1000000"], "image_size must be between 8 and 16384, got 1000000"),
        (["train", "--scales", "3", "1000001"], "scales must be odd kernel sizes of at most 127"),
        (["train", "--model", "resnet", "--prune-macs", "0.5"], "prune_macs must go with a cut that leaves an epoch"),
        (["train", "--epochs", "1", "--prune-at", "0.5"], "prune_at must go with a cut that leaves an epoch"),
        (["train", "--out", str(tmp_path / "r"), "--data", "folder:"], "data must name a folder, got 'folder:'"),
        (
            ["train", "--out", str(tmp_path / "r"), "--weights", str(run), "--width", "64"],
            "of the same width, got 4 for",
        ),
        (["export", str(run), "--format"], "format must be torch, onnx or both, got none"),
        (["evaluate", str(run), "--early-exit", "--target-macs", "0.01"], "of the deepest exit's, got 0.01"),
        (
            ["prune", str(run), "--out", str(tmp_path / "r"), "--target-latency-ms", "inf"],
            "above 0 and finite, got inf",
        ),
        (
            ["evaluate", str(run), "--early-exit", "--target-accuracy", "0.5", "--target-macs", "0.25"],
            "target_macs must be left out beside target_accuracy 0.5, got 0.25",
        ),
        (["evaluate", str(run), "--early-exit", "--split", "val"], "split must be 'test' with --early-exit"),
        (["bench", "--device", "cuda"], "operator must be trelu, depthwise or separable with --device, got none"),
        (["bench", "host", "--kernel-width", "5"], "or separable with --kernel-width, got host"),
        (["bench", "trelu", "--stride", "2"], "operator must be depthwise or separable with --stride, got trelu"),
        (["bench", "host", "--device", "foo"], "device must be cpu, or cuda where torch sees a GPU, got 'foo'"),
        ([*experiments, "--jobs", "-1"], "jobs must be at least 1, got -1"),
        (
            [*experiments, "--config", str(tmp_path / "own.yaml")],
            "keys must not be of the command's own options, got data",
        ),
        ([*experiments, "--config", str(tmp_path / "vgg.yaml")], "keys must not be model, which each row has"),
        ([*experiments, "--rows"], "rows must be of table5's: ResNet, "),
        ([*experiments, "--config", str(tmp_path / "two.yaml")], "devices must be 1, as runs are trained side by side"),
        (["walk"], "the command must be one of"),
    ]:
        line = fails(arguments, capsys)
        assert line.startswith("rkl: "), arguments
        assert expected in line, arguments
    assert not (tmp_path / "r").exists()


def test_a_run_that_fails_before_its_first_epoch_leaves_the_folder_free(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["train", *QUICK, "--out", str(tmp_path / "a" / "run")]
    with pytest.raises(SystemExit):
        main([*arguments, "--lr", "1e30"])
    assert "the training loss must be finite" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    main(arguments)
    assert (tmp_path / "a/run/metrics.json").exists()


def test_a_checkpoint_of_another_model_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = tmp_path / "other"
    checkpoint.write_text(other / "config.yaml", (run / "config.yaml").read_text().replace("depth: 18", "depth: 34"))
    tensors, facts = checkpoint.load(run / "checkpoints", "last")
    checkpoint.save(other / "checkpoints", "last", tensors, facts)
    line = fails(["evaluate", str(other)], capsys)
    assert "last.json: must be a checkpoint of this run's model" in line
    (other / "checkpoints" / facts["tensors"]).write_bytes(b"torn")
    assert "must be a whole safetensors file" in fails(["evaluate", str(other)], capsys)


def test_an_interrupted_save_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, "last", {"a": torch.ones(2)}, {"epoch": 1})

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, "last", {"a": torch.zeros(2)}, {"epoch": 2})
    tensors, facts = checkpoint.load(tmp_path, "last")
    assert facts["epoch"] == 1
    assert torch.equal(tensors["a"], torch.ones(2))


def test_a_checkpoint_saved_while_it_is_loaded(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may train meanwhile. The newer checkpoint is loaded, and not refused as damaged."""
    tensors, facts = checkpoint.load(run / "checkpoints", "last")
    checkpoint.save(tmp_path, "last", tensors, facts)
    whole = checkpoint.load_file

    def late(file: Path) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(checkpoint, "load_file", whole)
        checkpoint.save(tmp_path, "last", tensors, facts | {"epoch": facts["epoch"] + 1})
        return whole(file)

    monkeypatch.setattr(checkpoint, "load_file", late)
    assert checkpoint.load(tmp_path, "last")[1]["epoch"] == facts["epoch"] + 1


def test_the_module_runs_and_only_debug_shows_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rkl", "evaluate", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    with pytest.raises(checkpoint.RunError):
        main(["evaluate", str(tmp_path), "--debug"])


def test_safetensors_hold_model_momentum_and_average(run: Path) -> None:
    (file,) = (run / "checkpoints").glob("last-*.safetensors")
    assert {name.split(".")[0] for name in load_file(file)} == {"model", "momentum", "ema", "averaged"}
