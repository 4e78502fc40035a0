"""Augmentation on the device, by a few kernels for each batch. All random numbers come from a generator on the CPU.

The random numbers are few (offsets, boxes, one mixing weight) and are copied to the device at once. The pixels never
leave the device. torchvision's transforms draw from the global generator, which is seeded from ours while they run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

SHARED = 8
"""Images that share one random transform of TrivialAugment: launches for each image would cost more than the step."""


@contextmanager
def seeded(generator: Generator) -> Iterator[None]:
    """Seed the global generator by one draw from ``generator`` for the block, and restore its state after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


def crop_and_flip(images: Tensor, indices: Tensor, padding: int, flip: bool, generator: Generator) -> Tensor:
    """The images at ``indices``, each shifted by up to ``padding`` pixels each way and filled with zeros. With ``flip``
    each is mirrored with probability one half. The whole batch is one gather."""
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
    """TrivialAugment (Müller and Hutter, 2021) of uint8 images. Each eight images share one random transform."""
    from torchvision.transforms import v2  # late, here and below: it takes seconds, and only training mixes images

    transform = v2.TrivialAugmentWide()
    with seeded(generator):
        return torch.cat([transform(part) for part in images.split(SHARED)])


def erased(images: Tensor, heights: Tensor, widths: Tensor, generator: Generator) -> Tensor:
    """The images, in each of which a rectangle is set to zero (the mean). Its centre is uniform; the border clips it.

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
    """Cutout: erase a ``size`` x ``size`` square in each image (DeVries and Taylor, 2017)."""
    sizes = torch.full((len(images),), size)
    return erased(images, sizes, sizes, generator)


def random_erasing(images: Tensor, probability: float, generator: Generator) -> Tensor:
    """With a probability, erase a rectangle of 2% to 33% of the image, of aspect 0.3 to 3.3 (Zhong et al., 2020)."""
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
    (Zhang et al., 2018) with Beta(``mixup``, ``mixup``) if ``mixup`` is above 0. Labels of a mixed batch are soft."""
    from torchvision.transforms import v2

    draw = float(torch.rand((), generator=generator))
    if draw < cutmix:
        transform = v2.CutMix(num_classes=num_classes)
    elif mixup:
        transform = v2.MixUp(alpha=mixup, num_classes=num_classes)
    else:
        return images, labels
    with seeded(generator):
        return transform(images, labels)
