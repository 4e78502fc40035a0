"""The images of a run: loaded as its configuration says, and compared with those that it was trained on."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from .. import data as datasets
from ..config import Config
from ..data import Dataset, MissingDataError
from ..paths import FOLDER
from .checkpoint import Run
from .files import RunError


def load_data(config: Config) -> Dataset:
    """The data set that a configuration names."""
    options = {key: getattr(config, key) for key in ("train_size", "test_size", "imbalance", "download")}
    return datasets.load(config.data, config.data_root, config.image_size, config.val_fraction, config.seed, **options)


def data_of(run: Run) -> Dataset:
    """The data set that a run was trained on, for a command that takes its settings from the run.

    Raises:
        RunError: the files are not where the run's config.yaml says, or :func:`check_data` refuses them.
    """
    try:
        data = load_data(run.config)
    except MissingDataError as error:
        named = "data_root to the folder that holds it, or download to true,"
        change = "data to folder:PATH" if run.config.data.startswith(FOLDER) else named
        raise RunError(f"{error.rule}; set {change} in {run.folder / 'config.yaml'}") from None
    check_data(run.folder, run.facts, data)
    return data


def check_data(folder: Path, facts: dict[str, Any], data: Dataset) -> None:
    """Raise RunError unless ``data`` has the classes of the run in ``folder``, in the same order, since outputs go by
    position. Its images must be the same too: with one image more, others are cut out for the test, and the model may
    have been trained on these. A checkpoint without a fingerprint passes."""
    for number, (ours, theirs) in enumerate(zip_longest(facts["classes"], data.classes)):
        if ours != theirs:
            raise RunError(
                f"{folder}: data must have the classes the run was trained on, got {theirs!r} for {ours!r}, "
                f"number {number + 1}"
            )
    then = facts.get("fingerprint", data.fingerprint)
    # A separate test set may be another one. Where the test images are cut from train, train would change as well.
    others = [part for part in ("train", "val") if then.get(part) != data.fingerprint.get(part)]
    if others:
        raise RunError(
            f"{folder}: data must be the images the run was trained on, got others for {' and '.join(others)} in "
            f"{data.name}; put those back, or train another run"
        )
