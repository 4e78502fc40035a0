"""Batches with augmentation on the device: a few indexed copies a batch, so that no step waits for data.

Every random draw comes from one CPU generator seeded by (seed, epoch): the same batches on every device, and again
after a resume. The draws are small (indices, offsets, one box); the pixels never leave the device they are on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .dataset import DataError, Split

Augment = Literal["none", "standard"]
Sampling = Literal["natural", "balanced"]


def batches(
    split: Split,
    batch_size: int,
    *,
    num_classes: int,
    augment: Augment = "none",
    cutmix: bool = False,
    cutout: int = 0,
    sampling: Sampling = "natural",
    shuffle: bool = True,
    drop_last: bool = False,
    seed: int = 0,
    epoch: int = 0,
    device: torch.device | str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate once over a split.

    Args:
        augment: "standard" is a random crop from the image padded by an eighth, and a mirror where the split allows it.
        cutmix: mix every batch with itself (equation 1); the labels become soft.
        cutout: side of a square set to the mean, in pixels; 0 for none.
        sampling: "balanced" draws every class equally often, with replacement.
        shuffle: a new order each epoch; False gives the split's own order, for evaluation.
        drop_last: leave out a last batch smaller than the others (batch norm needs several samples).
        seed, epoch: together decide the order and every draw.
        device: of the batches; the split's own by default.
        rank, world_size: this process takes every ``world_size``-th sample of the common order.

    Yields:
        images (B, C, H, W) float32, normalised; labels (B,) int64, or (B, num_classes) float32 with CutMix.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    if augment not in ("none", "standard"):
        raise DataError(f"augment must be 'none' or 'standard', got {augment!r}")
    device = split.images.device if device is None else torch.device(device)
    order_generator = torch.Generator().manual_seed(_mixed(seed, epoch, 0))
    generator = torch.Generator().manual_seed(_mixed(seed, epoch, 1 + rank))
    order = _order(split, num_classes, sampling, shuffle, order_generator)[rank::world_size]
    mean = torch.tensor(split.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(split.std, device=device).view(1, -1, 1, 1)
    for indices in order.split(batch_size):
        if drop_last and len(indices) < batch_size and len(order) > batch_size:
            return
        batch = split.select(indices).to(device)
        images, labels = batch.images, batch.labels
        if augment == "standard":
            images = random_crop(images, max(1, images.shape[-1] // 8), generator)
            if split.flip:
                images = random_flip(images, generator)
        images = (images.float() / 255 - mean) / std
        if cutout:
            images = random_cutout(images, cutout, generator)
        if cutmix:
            images, labels = cut_mix(images, labels, num_classes, generator)
        yield images, labels


def _mixed(*numbers: int) -> int:
    """One generator seed from several numbers, well apart for neighbouring ones (a 64-bit linear congruence)."""
    state = 0
    for number in numbers:
        state = ((state ^ number) * 6364136223846793005 + 1442695040888963407) % 2**64
    return state >> 1


def _order(split: Split, num_classes: int, sampling: Sampling, shuffle: bool, generator: Generator) -> Tensor:
    if sampling == "balanced":
        weights = 1 / split.counts(num_classes).clamp_min(1).double().cpu()
        return torch.multinomial(weights[split.labels.cpu()], len(split), replacement=True, generator=generator)
    if sampling != "natural":
        raise DataError(f"sampling must be 'natural' or 'balanced', got {sampling!r}")
    return torch.randperm(len(split), generator=generator) if shuffle else torch.arange(len(split))


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Each image shifted by up to ``padding`` pixels each way, zeros moving in: one gather for the batch."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    shift = torch.randint(2 * padding + 1, (2, count, 1), generator=generator).to(images.device)
    rows = (shift[0] + torch.arange(height, device=images.device)).view(count, 1, height, 1)
    columns = (shift[1] + torch.arange(width, device=images.device)).view(count, 1, 1, width)
    which = torch.arange(count, device=images.device).view(count, 1, 1, 1)
    return padded[which, torch.arange(channels, device=images.device).view(1, channels, 1, 1), rows, columns]


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Each image mirrored left to right with probability one half."""
    mirrored = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def random_cutout(images: Tensor, size: int, generator: Generator) -> Tensor:
    """A ``size`` x ``size`` square set to zero (the mean) in each image, clipped at its border (DeVries, 2017)."""
    count, _, height, width = images.shape
    inside = []
    for length in (height, width):
        centre = torch.randint(length, (count, 1), generator=generator).to(images.device)
        position = torch.arange(length, device=images.device)
        inside.append((position >= centre - size // 2) & (position < centre - size // 2 + size))
    hole = inside[0].view(count, 1, height, 1) & inside[1].view(count, 1, 1, width)
    return images.masked_fill(hole, 0)


def cut_mix(images: Tensor, labels: Tensor, num_classes: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """CutMix (equation 1; Yun et al., 2019) of the batch with itself rolled by one, one box for the batch.

    Equivalent to ``torchvision.transforms.v2.CutMix(num_classes=num_classes)``, which draws from the global generator:
    lambda ~ U(0, 1), a box of that share's complement around a uniform centre, clipped at the border, and lambda
    recomputed from the clipped box.
    """
    height, width = images.shape[-2:]
    share = float(torch.rand((), generator=generator))
    half = 0.5 * (1 - share) ** 0.5
    y, x = int(torch.randint(height, (), generator=generator)), int(torch.randint(width, (), generator=generator))
    top, bottom = max(y - int(half * height), 0), min(y + int(half * height), height)
    left, right = max(x - int(half * width), 0), min(x + int(half * width), width)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    weight = 1 - (bottom - top) * (right - left) / (height * width)
    hot = F.one_hot(labels, num_classes).to(images.dtype)
    return mixed, hot * weight + hot.roll(1, 0) * (1 - weight)
