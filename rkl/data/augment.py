"""Augmentation on the device: a few kernels a batch, every draw from a generator on the CPU.

The draws are small (offsets, boxes, one mixing weight) and go over in one copy; the pixels never leave the device. What
draws from the global generator (torchvision's transforms) runs with it seeded from ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor
from torchvision.transforms import v2

SHARED = 8
"""Images of a batch that share one draw of TrivialAugment: kernel launches for every image cost more than the step."""


@contextmanager
def seeded(generator: Generator) -> Iterator[None]:
    """The global generator, seeded by one draw from ``generator`` and as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def crop_and_flip(images: Tensor, indices: Tensor, padding: int, flip: bool, generator: Generator) -> Tensor:
    """The images at ``indices``, each shifted by up to ``padding`` pixels each way with zeros moving in, and where
    ``flip`` is set mirrored with probability one half: one gather for the batch."""
    count, (channels, height, width) = len(indices), images.shape[1:]
    drawn = torch.randint(2 * padding + 1, (3, count, 1), generator=generator)
    drawn[2] = torch.rand(count, 1, generator=generator) < 0.5 * flip
    down, right, mirrored = drawn.to(images.device, non_blocking=True)
    rows = down - padding + torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device)
    columns = right - padding + torch.where(mirrored.bool(), width - 1 - across, across)
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    taken = images[
        indices.view(count, 1, 1, 1),
        torch.arange(channels, device=images.device).view(1, channels, 1, 1),
        rows.clamp(0, height - 1).view(count, 1, height, 1),
        columns.clamp(0, width - 1).view(count, 1, 1, width),
    ]
    return taken * inside


def trivial_augment(images: Tensor, generator: Generator) -> Tensor:
    """TrivialAugment (Müller and Hutter, 2021) of uint8 images, one random transform for every eight of them."""
    transform = v2.TrivialAugmentWide()
    with seeded(generator):
        return torch.cat([transform(part) for part in images.split(SHARED)])


def erased(images: Tensor, heights: Tensor, widths: Tensor, generator: Generator) -> Tensor:
    """A rectangle set to zero (the mean) in each image around a uniform centre, clipped at the border.

    Args:
        heights, widths: (N,) integers on the CPU; 0 erases nothing.
    """
    inside = []
    for length, sizes in zip(images.shape[-2:], (heights, widths), strict=True):
        start = torch.randint(length, (len(images),), generator=generator) - sizes // 2
        limits = torch.stack([start, start + sizes])[:, :, None].to(images.device, non_blocking=True)
        position = torch.arange(length, device=images.device)
        inside.append((position >= limits[0]) & (position < limits[1]))
    return images.masked_fill(inside[0][:, None, :, None] & inside[1][:, None, None, :], 0)


def random_cutout(images: Tensor, size: int, generator: Generator) -> Tensor:
    """A ``size`` x ``size`` square in each image (DeVries and Taylor, 2017)."""
    sizes = torch.full((len(images),), size)
    return erased(images, sizes, sizes, generator)


def random_erasing(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """With a probability, a rectangle of 2% to 33% of the image and an aspect of 0.3 to 3.3 (Zhong et al., 2020)."""
    count, (height, width) = len(images), images.shape[-2:]
    taken, area, aspect = torch.rand(3, count, generator=generator)
    pixels = (0.02 + 0.31 * area) * height * width * (taken < probability)
    ratio = torch.exp((2 * aspect - 1) * math.log(3.3))
    heights, widths = (side.sqrt().round().long() for side in (pixels * ratio, pixels / ratio))
    return erased(images, heights, widths, generator)


def mixed(
    images: Tensor, labels: Tensor, num_classes: int, cutmix: float, mixup: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """The batch mixed with itself: by CutMix (equation 1; Yun et al., 2019) with probability ``cutmix``, else by mixup
    (Zhang et al., 2018) with Beta(``mixup``, ``mixup``) where that is above 0; then the labels are soft."""
    draw = float(torch.rand((), generator=generator))
    if draw < cutmix:
        transform = v2.CutMix(num_classes=num_classes)
    elif mixup:
        transform = v2.MixUp(alpha=mixup, num_classes=num_classes)
    else:
        return images, labels
    with seeded(generator):
        return transform(images, labels)
