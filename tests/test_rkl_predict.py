"""From files to answers: preparation as in training, one bad file among many, and the thresholds of the run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from rkl.cli import main
from rkl.config import Config
from rkl.data import DataError, load
from rkl.data.dataset import resized
from rkl.data.formats import image_folder, image_tensor
from rkl.deploy import predict as prediction
from rkl.network.model import ResNetKL
from rkl.slimming.early_exit import early_exit, operate
from rkl.training import train as trainer
from rkl.training.checkpoint import load as load_checkpoint
from rkl.training.checkpoint import open_run
from rkl.training.checkpoint import save as save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")


def ramp(height: int, width: int) -> np.ndarray:
    """Greys that rise to the right and to the bottom, so that turning, cropping and squashing all show."""
    return np.add.outer(np.linspace(0, 100, height), np.linspace(0, 150, width)).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 16 images, wider than high."""
    root = tmp_path_factory.mktemp("images")
    for number, name in enumerate(("cat [x]", "dog")):
        (root / name).mkdir()
        for i in range(16):
            Image.fromarray(np.roll(ramp(20, 30), i + 7 * number, 1)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    options = {"width": 4, "image_size": 8, "epochs": 1, "batch_size": 8, "prune_at": ()}
    trainer.train(Config(out, data=f"folder:{folder}", **options))
    return out


def test_files_are_prepared_as_in_training(run: Path, folder: Path) -> None:
    """A file of the training set gives the tensor that training takes from it, except for augmentation."""
    data = load(f"folder:{folder}", image_size=8)
    pixels = torch.cat([data.train.images, data.val.images, data.test.images])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    image = prediction.read_image(folder / "dog" / "3.png", open_run(run)) * std + mean
    assert (pixels.float() / 255 - image).abs().amax((1, 2, 3)).min() < 1e-5


@pytest.mark.parametrize("size", [5, 8, 13, 16])
def test_files_are_scaled_as_a_data_sets_images_are(tmp_path: Path, size: int) -> None:
    """Digits from files and digits in memory have the same pixels at any size, except for the rounding of halves."""
    images = load("digits", image_size=8).test.images[:20]
    wanted = resized(images, size).int()
    for number, (image, scaled) in enumerate(zip(images, wanted, strict=True)):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{number}.png")
        assert (image_tensor(tmp_path / f"{number}.png", size, 1).int() - scaled).abs().max() <= 2


def test_every_format_that_predict_reads_is_read_for_training(tmp_path: Path) -> None:
    suffixes = {".bmp", ".gif", ".jp2", ".jpg", ".png", ".pgm", ".tif", ".webp"}
    suffixes |= {".avif"} if features.check("avif") else set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for suffix in suffixes:
            Image.fromarray(ramp(16, 16)).convert("RGB").save(tmp_path / name / f"image{suffix}")
    assert len(image_folder(tmp_path, ["a", "b"], 8).labels) == 2 * len(suffixes)


def test_the_orientation_in_exif_counts(tmp_path: Path) -> None:
    upright = Image.fromarray(ramp(16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.rotate(90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert torch.equal(image_tensor(tmp_path / "turned.png", 8), image_tensor(tmp_path / "upright.png", 8))


@pytest.mark.parametrize(("suffix", "scale", "kind"), [("png", 257, np.uint16), ("tiff", 1 / 255, np.float32)])
def test_greys_of_more_bits_keep_their_scale(tmp_path: Path, suffix: str, scale: float, kind: type) -> None:
    """16 bits, and floats from 0 to 1: within one step of the 8-bit image."""
    Image.fromarray(ramp(16, 16)).save(tmp_path / "eight.png")
    Image.fromarray((ramp(16, 16).astype(float) * scale).astype(kind)).save(tmp_path / f"more.{suffix}")
    more, eight = (image_tensor(tmp_path / name, 8).int() for name in (f"more.{suffix}", "eight.png"))
    assert int((more - eight).abs().max()) <= 1


def test_greys_out_of_range_and_huge_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, got in (("nan", np.nan, "nan"), ("large", 3e5, "300000")):
        Image.fromarray(np.full((8, 8), value, np.float32)).save(tmp_path / f"{name}.tiff")
        with pytest.raises(DataError, match=rf"{name}\.tiff: greys must be within 0 to 1 or 0 to 255, got .*{got}"):
            image_tensor(tmp_path / f"{name}.tiff", 8)
    Image.new("L", (40, 40)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError, match=r"huge\.png: must have at most 1,000 pixels"):
        image_tensor(tmp_path / "huge.png", 8)


def test_one_bad_file_costs_no_other_answer(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of two. A name looks like markup and is longer than a terminal is wide."""
    monkeypatch.setattr(prediction, "BATCH", 2)
    (tmp_path / "torn.png").write_bytes(b"no image")
    long = tmp_path / ("[b]" + 90 * "n" + ".png")
    long.write_bytes((folder / "dog" / "1.png").read_bytes())
    good = [folder / "dog" / "0.png", long, folder / "cat [x]" / "2.png"]
    with pytest.raises(SystemExit) as stopped:
        main(["predict", str(run), str(good[0]), str(tmp_path / "torn.png"), *map(str, good[1:])])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in good]
    assert all("cat [x] " in line for line in lines)
    assert said.err.startswith("rkl: ")
    assert "torn.png: must be a readable image" in said.err


def test_names_that_the_terminal_cannot_write_are_answered(run: Path, folder: Path, tmp_path: Path) -> None:
    """A name that is not UTF-8, as an old archive may leave it, beside one that is."""
    paths = [tmp_path / os.fsdecode(b"caf\xe9.png"), tmp_path / "café.png"]
    for path in paths:
        path.write_bytes((folder / "dog" / "0.png").read_bytes())
    command = [sys.executable, "-m", "rkl", "predict", str(run), *map(str, paths)]
    for encoding, names in (("utf-8", ["caf\\udce9", "café"]), ("ascii", ["caf\\udce9", "caf\\xe9"])):
        strict = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}
        said = subprocess.run(command, env=strict, stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout
        assert [line.split(".png: ")[0] for line in said.splitlines()] == [f"{tmp_path}/{name}" for name in names]


def test_the_runs_thresholds_are_the_default(run: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    opened = open_run(run)
    assert prediction.thresholds_of(opened, "last") == metrics["thresholds"]
    assert prediction.thresholds_of(opened, "best") is None
    image, epoch = str(folder / "dog" / "0.png"), opened.facts["epoch"]
    record = {"checkpoint": "last", "epoch": epoch, "thresholds": [2.0, 0.0, 2.0]}
    (run / "early_exit.json").write_text(json.dumps(record | {"epoch": epoch - 1}))
    assert prediction.thresholds_of(opened, "last") == metrics["thresholds"], "not those of an earlier epoch"
    (run / "early_exit.json").write_text(json.dumps(record))
    main(["predict", str(run), image])
    assert "left at exit 2 of 4" in capsys.readouterr().out
    (run / "early_exit.json").unlink()


def test_files_are_classified_in_the_runs_precision(run: Path, folder: Path) -> None:
    opened, seen = open_run(run), set()
    opened = replace(opened, config=replace(opened.config, precision="bf16-mixed"))
    opened.model.fc.register_forward_hook(lambda module, inputs, logits: seen.add(logits.dtype))
    (answer,) = prediction.predict(opened, [folder / "dog" / "0.png"])
    assert seen == {torch.bfloat16}
    assert sum(chance for _, chance in answer.top) == pytest.approx(1, abs=1e-6), "softmax is of float32"


def test_one_exit_takes_no_confidence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = {"width": 4, "image_size": 8, "epochs": 1, "batch_size": 8, "model": "resnet"}
    trainer.train(Config(tmp_path / "run", data=f"folder:{folder}", **options))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path / "run"), str(folder / "dog" / "0.png"), "--confidence", "0.5"])
    assert "confidence must go with a model of several exits, got 0.5 for resnet" in capsys.readouterr().err


def test_a_renamed_class_is_no_silent_zero(run: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "dog").rename(folder / "hound")
    try:
        with pytest.raises(SystemExit):
            main(["evaluate", str(run)])
    finally:
        (folder / "hound").rename(folder / "dog")
    assert "data must have the classes the run was trained on, got 'hound' for 'dog'" in capsys.readouterr().err


def test_images_in_another_folder(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run goes on with them if they have its classes, and not if the classes would mean something else."""
    begun, moved = shutil.copytree(run, tmp_path / "run"), shutil.copytree(folder, tmp_path / "moved")
    (begun / "metrics.json").unlink()  # as where the run was stopped before its test
    command = ["train", "--resume", "--out", str(begun), "--data", f"folder:{moved}"]
    (moved / "dog").rename(moved / "hound")
    with pytest.raises(SystemExit):
        main(command)
    assert "data must have the classes the run was trained on, got 'hound' for 'dog'" in capsys.readouterr().err
    assert not (begun / "metrics.json").exists()
    (moved / "hound").rename(moved / "dog")
    main(command)
    assert (begun / "metrics.json").exists()
    main(["evaluate", str(begun)])
    assert f"folder:{moved}" in "".join(capsys.readouterr().out.split())  # in lines as wide as the terminal
    with pytest.raises(SystemExit):
        main([*command[:-1], "digits"])
    assert "a resumed run must keep its settings, got data 'digits'" in capsys.readouterr().err


def test_one_more_image_is_noticed(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It changes which images are set aside for the test, so the run may have trained on those."""
    begun, other = shutil.copytree(run, tmp_path / "run"), shutil.copytree(folder, tmp_path / "more")
    shutil.copy(other / "dog" / "0.png", other / "dog" / "00.png")
    config = begun / "config.yaml"
    config.write_text(config.read_text().replace(str(folder), str(other)))
    for command in (
        ["evaluate", str(begun)],
        ["evaluate", str(begun), "--early-exit"],
        ["prune", str(begun), "--out", str(tmp_path / "slim"), "--target-macs", "0.7"],
        ["train", "--resume", "--out", str(begun)],
    ):
        with pytest.raises(SystemExit):
            main(command)
        said = capsys.readouterr().err
        assert "data must be the images the run was trained on, got others for train in folder:" in said
    tensors, facts = load_checkpoint(begun / "checkpoints", "last")
    del facts["fingerprint"]  # as in a checkpoint that was saved before there was one
    save_checkpoint(begun / "checkpoints", "last", tensors, facts)
    main(["evaluate", str(begun)])


def test_outputs_that_are_not_finite_are_said(run: Path, folder: Path) -> None:
    model = ResNetKL(3, 18, 8, 1, 8).eval()
    images = torch.full((2, 1, 8, 8), torch.nan)
    logits, exits = early_exit(model, images, [0.5] * 3)
    assert logits.isnan().all()
    assert exits.tolist() == [3, 3]
    shares = operate([torch.full((2, 3), torch.nan)] * 4, torch.tensor([0, 1]), ([1] * 4, [1] * 4), [0.5] * 3).shares
    assert shares == [0, 0, 0, 1]
    broken = open_run(run)
    torch.nn.init.constant_(broken.model.fc.bias, torch.nan)
    (answer,) = prediction.predict(broken, [folder / "dog" / "0.png"])
    assert "outputs must be finite, got nan" in str(answer)
