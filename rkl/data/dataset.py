"""What a data set is: three splits of uint8 images with integer labels, and the rules for them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor


class DataError(ValueError):
    """A file or argument breaks a rule. The message is one line that names it, the rule and the value got."""


class MissingDataError(DataError):
    """There is no data set where it is looked for. ``rule`` is the message without its remedy, since the remedy depends
    on the command."""

    def __init__(self, rule: str, remedy: str) -> None:
        self.rule = rule
        super().__init__(f"{rule}; {remedy}")


@dataclass(frozen=True)
class Split:
    """One part of a data set.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        mean, std: one value for each channel, for pixels of 0 to 1; :func:`rkl.data.batches` normalises with them.
        flip: whether a mirrored image keeps its class (a digit does not).
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The split on a device. Its batches are made there, without further copies."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def select(self, indices: Tensor) -> Split:
        """The samples at ``indices``, in that order."""
        indices = indices.to(self.labels.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def counts(self, num_classes: int) -> Tensor:
        """The number of samples of each class, (num_classes,) int64."""
        return torch.bincount(self.labels, minlength=num_classes)


@dataclass(frozen=True)
class Dataset:
    """A named data set. train and val are cut from the training images; test is separate and the same for every seed.

    Attributes:
        fingerprint: a SHA-256 for each part that was read. It shows whether a later load finds the same images.
    """

    name: str
    classes: list[str]
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    val: Split
    test: Split
    fingerprint: dict[str, str] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def to(self, device: torch.device | str) -> Dataset:
        """The data set with its splits on a device."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


def fingerprint(split: Split) -> str:
    """SHA-256 of a split's labels and pixels in their order. The order matters, since val is cut out by index."""
    sha = hashlib.sha256(repr(tuple(split.images.shape)).encode())
    for values in (split.labels, split.images):
        sha.update(values.reshape(-1).numpy().data)
    return sha.hexdigest()


def class_weights(split: Split, num_classes: int) -> Tensor:
    """Weights for cross entropy under which all classes count alike: N / (classes * count), (num_classes,) float32."""
    return len(split) / (num_classes * split.counts(num_classes).clamp_min(1).float())


def stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a random ``share`` of every class, and of the rest, both ascending.

    A class with two samples or more has at least one in both, so that every metric sees the class.
    """
    generator = torch.Generator().manual_seed(seed)
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        count = round(len(members) * share)
        if 0 < share < 1 and len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        taken[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return torch.nonzero(taken).flatten(), torch.nonzero(~taken).flatten()


def subset(split: Split, size: int | None, option: str) -> Split:
    """About ``size`` samples with the split's class shares, the same for every seed. None: the split itself."""
    if size is None:
        return split
    if not 0 < size <= len(split):
        raise DataError(f"{option} must be between 1 and the {len(split)} images there are, got {size}")
    return split.select(stratified(split.labels, size / len(split), seed=0)[0])


def long_tailed(split: Split, num_classes: int, imbalance: float) -> Split:
    """Keep n * imbalance^(-c / (classes - 1)) samples of class c: the usual exponential profile (Cui et al., 2019).

    At least two samples are kept, so that training and validation both have every class.
    """
    if not imbalance >= 1:  # written so that nan is refused
        raise DataError(f"imbalance must be at least 1 (first class to last), got {imbalance}")
    largest = int(split.counts(num_classes).max())
    generator = torch.Generator().manual_seed(0)
    kept = []
    for label in range(num_classes):
        members = torch.nonzero(split.labels == label).flatten()
        count = max(2, int(largest * imbalance ** (-label / max(1, num_classes - 1))))
        kept.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return split.select(torch.cat(kept).sort().values)


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images scaled to ``size`` x ``size``: bilinear, and antialiased where they shrink. Image files are scaled
    likewise (:func:`rkl.data.formats.image_tensor`)."""
    if images.shape[-2:] == (size, size):
        return images
    parts = [
        F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True).round_().to(torch.uint8)
        for part in images.split(4096)  # in parts, since a whole data set in floats may not fit in memory
    ]
    return torch.cat(parts)


def assemble(
    name: str,
    classes: list[str],
    train: Split,
    test: Split,
    *,
    val: Split | None,
    flip: bool,
    val_fraction: float,
    seed: int,
) -> Dataset:
    """Cut the validation split (unless the data set brings one), check every split and compute mean and std."""
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
    if val is None:
        held_out, kept = stratified(train.labels, val_fraction, seed)
        train, val = train.select(kept), train.select(held_out)
    if val_fraction and not len(val):
        count = len(train)
        raise DataError(
            f"val_fraction {val_fraction:g} of {count} training images must leave some to validate on, got 0"
        )
    if len(train) < 2:
        raise DataError(f"{name} train: must hold at least 2 images beside those for validation, got {len(train)}")
    for part, split in (("train", train), ("val", val), ("test", test)):
        if part != "val" or len(split):
            _check_labels(f"{name} {part}", split, classes)
    mean, std = _statistics(train.images)
    train, val, test = (replace(split, mean=mean, std=std, flip=flip) for split in (train, val, test))
    channels, image_size = train.images.shape[1], train.images.shape[-1]
    return Dataset(name, classes, image_size, channels, mean, std, train, val, test)


def _check_labels(where: str, split: Split, classes: list[str]) -> None:
    if len(split.images) != len(split.labels):
        raise DataError(f"{where}: one label an image, got {len(split.images)} images and {len(split.labels)} labels")
    if len(split) and not 0 <= int(split.labels.min()) <= int(split.labels.max()) < len(classes):
        wrong = split.labels[(split.labels < 0) | (split.labels >= len(classes))][0]
        raise DataError(f"{where}: labels must be between 0 and {len(classes) - 1}, got {int(wrong)}")
    missing = torch.nonzero(split.counts(len(classes)) == 0).flatten().tolist()
    if missing:
        raise DataError(f"{where}: every class must have an image, got none of {classes[missing[0]]!r}")


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel. A histogram gives them exactly, without float copies of images."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        share /= share.sum()
        centre = float((share * levels).sum())
        mean.append(centre)
        std.append(max(float((share * (levels - centre) ** 2).sum()) ** 0.5, 1 / 255))
    return tuple(mean), tuple(std)
