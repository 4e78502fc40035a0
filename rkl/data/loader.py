"""Batches that are made on the device, so that no step waits for data.

All random numbers of a batch come from one CPU generator, seeded by (seed, epoch, the batch's number). So the batches
are the same on every device, with any number of processes, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Generator, Tensor

from . import augment as augmentation
from .dataset import DataError, Split

Augment = Literal["none", "standard", "trivial"]
Sampling = Literal["natural", "balanced"]


def batches(
    split: Split,
    batch_size: int,
    *,
    num_classes: int,
    augment: Augment = "none",
    cutmix: float = 0.0,
    mixup: float = 0.0,
    cutout: int = 0,
    erasing: float = 0.0,
    sampling: Sampling = "natural",
    shuffle: bool = True,
    drop_last: bool = False,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate once over a split, on its own device.

    Args:
        augment: "standard" crops at random from the image padded by an eighth, and mirrors at random where the split
            allows it; "trivial" adds TrivialAugment.
        cutmix: probability that a batch is mixed with itself (equation 1), which makes its labels soft.
        mixup: alpha of mixup, for batches without CutMix; 0 for none.
        cutout: side of a square set to the mean, in pixels; 0 for none.
        erasing: probability that a rectangle of an image is set to the mean.
        sampling: "balanced" draws every class equally often, with replacement.
        shuffle: whether each epoch has a new order; False keeps the split's order, for evaluation.
        drop_last: whether a smaller last batch is left out (batch norm needs several samples).
        seed, epoch: together they determine the order and all random numbers.
        rank, world_size: this process takes every ``world_size``-th batch.

    Yields:
        images (B, C, H, W) float32, normalised; labels (B,) int64, or (B, num_classes) float32 where mixed.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    if augment not in ("none", "standard", "trivial"):
        raise DataError(f"augment must be 'none', 'standard' or 'trivial', got {augment!r}")
    device = split.images.device
    order = _order(split, num_classes, sampling, shuffle, torch.Generator().manual_seed(_mixed(seed, epoch, 0)))
    order = order.to(device)
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (split.mean, split.std))
    scale, shift = 1 / (255 * std), mean / std
    size = min(batch_size, max(1, len(order)))  # torch cannot hold every number
    for number, indices in enumerate(order.split(size)):
        if drop_last and len(indices) < batch_size and len(order) > batch_size:
            return
        if number % world_size != rank:
            continue
        generator = torch.Generator().manual_seed(_mixed(seed, epoch, 1 + number))
        labels = split.labels[indices]
        if augment == "none":
            images = split.images[indices]
        else:
            padding = max(1, split.images.shape[-1] // 8)
            images = augmentation.crop_and_flip(split.images, indices, padding, split.flip, generator)
        if augment == "trivial":
            images = augmentation.trivial_augment(images, generator)
        images = images.float().mul_(scale).sub_(shift)
        if cutout:
            images = augmentation.random_cutout(images, cutout, generator)
        if erasing:
            images = augmentation.random_erasing(images, erasing, generator)
        if cutmix or mixup:
            images, labels = augmentation.mixed(images, labels, num_classes, cutmix, mixup, generator)
        yield images, labels


def _mixed(*numbers: int) -> int:
    """One seed from several numbers. Neighbouring numbers give very different seeds (a 64-bit linear congruence)."""
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
