"""Where a run's settings come from, and which settings exclude each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rkl import cli, terminal
from rkl.config import Config
from rkl.train_options import read_options


def test_the_strong_recipe_is_the_public_benchmarks_protocol() -> None:
    strong = read_options(["--recipe", "strong"]).settings
    assert (strong.epochs, strong.batch_size, strong.lr, strong.schedule) == (200, 128, 0.1, "cosine")


def test_a_file_goes_over_the_recipe_and_an_option_over_both(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("epochs: 7\nlr: 0.3\n")
    settings = read_options(["--recipe", "smoke", "--config", str(tmp_path / "a.yaml"), "--lr", "0.2"]).settings
    assert (settings.epochs, settings.width, settings.lr) == (7, 8, 0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nesterov": True, "momentum": 0.0}, "nesterov must go with a momentum above 0"),
        ({"warmup": 3.0, "epochs": 2}, "warmup must be at most the 2 epochs, got 3"),
        ({"patience": 2, "val_fraction": 0.0}, "patience must go with a val_fraction above 0, got 2"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1"),
        ({"feature_size": 10**12}, "feature_size must be between 1 and 16384, got 1000000000000"),
        ({"batch_size": 1}, "batch_size must be at least 2, as batch norm needs several samples, got 1"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_a_tilde_is_the_home_wherever_a_path_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell expands `~` only at the start of a word, and never in a file: `out: ~/run` made a folder named `~`."""
    monkeypatch.setenv("HOME", "/home/anna")
    (tmp_path / "settings.yaml").write_text("out: ~/run\ndata: folder:~/photos\ndata_root: ~/sets\nweights: ~/first")
    settings = read_options(["--config", str(tmp_path / "settings.yaml")]).settings
    assert (settings.out, settings.data) == (Path("/home/anna/run"), "folder:/home/anna/photos")
    assert (settings.data_root, settings.weights) == (Path("/home/anna/sets"), Path("/home/anna/first"))
    settings = read_options(["--out=~/run", "--data", "folder:~/photos", "--data-root", "a~/~"]).settings
    assert (settings.out, settings.data) == (Path("/home/anna/run"), "folder:/home/anna/photos")
    assert settings.data_root == Path("a~/~")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs: 1\nlr: 0.1\nepochs: 200", "the key 'epochs' twice; remove one of the two (line 3, column 1)"),
        ("loss: {l1: 0, 'l1': 1}", "the key 'l1' twice; remove one of the two (line 1, column 15)"),
        ("epochs: &some 1\nwidth: *some", "an alias, which a configuration may not use (line 2, column 8)"),
        ("epochs: 1\nlr: a: b", "mapping values are not allowed here (line 2, column 6)"),
        ("epochs: 1\n---\nlr: 1", "expected a single document in the stream, but found another document (line 2, "),
    ],
)
def test_a_file_that_is_refused_is_told_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    """Of a key that a file has twice the first value was dropped; other errors told no line, or half of the reason."""
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"must be YAML, got: {re.escape(said)}"):
        read_options(["--config", str(tmp_path / "settings.yaml")])


def test_an_empty_path_is_not_this_folder() -> None:
    """`--out "$RUN"` with an unset variable trained in the present folder."""
    for arguments in (["--out", ""], ["--width", "8", "--out="]):
        with pytest.raises(ValueError, match=r"^--out must have a value, got an empty one; give one"):
            read_options(arguments)
    with pytest.raises(ValueError, match=r"^every argument must have a value, got an empty one; "):
        terminal.parse(cli.Export, ["", "--format", "onnx"])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_wrong_option_is_told_without_its_frame(encoding: str) -> None:
    """The frame is of dashes where the terminal has no lines."""

    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "rkl", *arguments]
        told = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, text=True)
        assert told.returncode == 2
        return told.stderr

    assert said("train", "extra") == "rkl: Unrecognized options: extra\n"
    missing = "rkl: Missing from rkl evaluate: PATH Folder of the run. (required)\n"
    assert said("evaluate") == missing
    assert said("train", "--loss.x").startswith("rkl: Missing value for argument '--loss.x'.")
