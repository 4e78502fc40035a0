"""The data sets by name, and where their files are."""

from __future__ import annotations

from pathlib import Path

import torch

from .dataset import DataError, Dataset, Split, assemble, resized, stratified, subset

NAMES = ("digits",)
"""What :func:`load` takes."""


def load(
    name: str,
    root: str | Path | None = None,
    image_size: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    *,
    train_size: int | None = None,
    test_size: int | None = None,
) -> Dataset:
    """A data set in memory, its validation split cut from the training images by ``seed``, class by class.

    Args:
        name: one of :data:`NAMES`.
        root: folder of the data set's files; where they usually are by default.
        image_size: pixels a side; the data set's own by default (digits: 16, twice their own).
        val_fraction: share of the training images held out for validation.
        seed: decides which ones.
        train_size, test_size: a fixed part of the training (validation included) and test images, for small runs.

    Raises:
        DataError: an unknown name, a missing or damaged file, a class missing from a split: one line that says which.
    """
    if name != "digits":
        raise DataError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
    train, test, classes = _digits()
    size = image_size or 16
    if size < 8:
        raise DataError(f"image_size must be at least 8, got {size}")
    train, test = subset(train, train_size, "train_size"), subset(test, test_size, "test_size")
    train, test = (Split(resized(part.images, size), part.labels) for part in (train, test))
    return assemble(name, classes, train, test, flip=False, val_fraction=val_fraction, seed=seed)


def _digits() -> tuple[Split, Split, list[str]]:
    """1,797 scans of handwritten digits (UCI, in scikit-learn's wheel); a fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).view(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8)
    whole = Split(images, torch.from_numpy(labels).long())
    test, train = stratified(whole.labels, 0.2, seed=0)
    return whole.select(train), whole.select(test), [str(digit) for digit in range(10)]
