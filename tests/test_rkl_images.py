"""What a command says where a finished run's images are not where they were."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_rkl_train import fails

from rkl.cli import main
from rkl.config import Config
from rkl.training import train as trainer
from rkl.training.checkpoint import open_run
from rkl.training.files import RunError
from rkl.training.images import data_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder of images, which has moved since to the folder ``moved`` beside it."""
    root, draw = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}.png")
    settings = {"width": 4, "image_size": 8, "epochs": 1, "batch_size": 8, "prune_at": ()}
    trainer.train(Config(root / "run", data=f"folder:{root / 'images'}", **settings))
    shutil.move(root / "images", root / "moved")
    return root / "run"


def options(command: str, capsys: pytest.CaptureFixture) -> set[str]:
    """The options of a command, by its help."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--[\w.-]+", capsys.readouterr().out))


@pytest.mark.parametrize(
    "command", [["evaluate", "RUN"], ["evaluate", "RUN", "--early-exit"], ["prune", "RUN", "--target-macs", "0.5"]]
)
def test_a_remedy_for_missing_images_is_one_that_the_command_has(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: list[str]
) -> None:
    """They named --data-root, which neither of the two commands has."""
    again = Path(shutil.copytree(run, tmp_path / "run"))
    arguments = [str(again) if word == "RUN" else word for word in command]
    arguments += ["--out", str(tmp_path / "slim")] if command[0] == "prune" else []
    said = fails(arguments, capsys)
    assert "got no such folder" in said
    assert set(re.findall(r"--[\w.-]+", said)) <= options(command[0], capsys)
    file = again / "config.yaml"
    assert f"set data to folder:PATH in {file}" in said
    file.write_text(file.read_text().replace(str(run.parent / "images"), str(run.parent / "moved")))
    main(arguments)


def test_a_run_on_a_named_data_set_is_told_the_settings_that_find_it(run: Path, tmp_path: Path) -> None:
    opened = open_run(run)
    elsewhere = replace(opened, config=replace(opened.config, data="cifar10", data_root=tmp_path))
    remedy = f"set data_root to the folder that holds it, or download to true, in {run / 'config.yaml'}"
    with pytest.raises(RunError, match=f"cifar10: no data_batch_1 or .* under {tmp_path}; {re.escape(remedy)}$"):
        data_of(elsewhere)


def test_training_is_told_its_own_options(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for data, named in (("cifar10", {"--data-root", "--download"}), (f"folder:{tmp_path / 'none'}", {"--data"})):
        root = [] if data != "cifar10" else ["--data-root", str(tmp_path)]
        for command in (["train"], ["experiments", "table5", "--scale", "smoke"]):
            said = fails([*command, "--data", data, *root, "--out", str(tmp_path / "out")], capsys)
            assert set(re.findall(r"--[\w.-]+", said)) == named
            assert named <= options(command[0], capsys)
