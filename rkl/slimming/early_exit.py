"""Early exit: a sample leaves at the first head that is confident enough. The rest of the batch goes on."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import rkl_kernels as rk

from ..network.model import ResNet

NEVER = 2.0
"""A threshold that no probability reaches: the exit is not used."""


@torch.no_grad()
def early_exit(model: ResNet, images: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
    """Classify a batch. Each sample leaves at the first exit whose threshold its top probability reaches.

    After each head the batch is reduced to the samples that stay, so samples that left cost nothing more. In eval mode
    no layer mixes samples, so each sample's result is the same as in a batch of its own.

    Args:
        images: (N, C, H, W), normalised.
        thresholds: one for each exit but the deepest, where all remaining samples leave.

    Returns:
        logits (N, classes) in float32 of the exit at which each sample left, and the number (N,) of that exit, from 0.

    Raises:
        ValueError: not one threshold for each shallow exit, or the model is in training mode.

    Examples:
        >>> from rkl.slimming.early_exit import early_exit
        >>> from rkl.network.model import ResNetKL
        >>> model = ResNetKL(10, width=16).eval()
        >>> logits, exits = early_exit(model, torch.randn(2, 3, 32, 32), [0.0, 0.9, 0.9])
        >>> logits.shape, exits.tolist()  # any confidence is enough at the first exit
        (torch.Size([2, 10]), [0, 0])
    """
    stages = model.exit_stages
    if len(thresholds) != len(stages) - 1:
        raise ValueError(f"thresholds must be one for each of {len(stages) - 1} shallow exits, got {len(thresholds)}")
    if model.training:
        raise ValueError("model must be in eval mode, got training mode; call model.eval()")
    # An exit at which no sample can leave is not run.
    limits = dict(zip(stages, [*thresholds, 0.0], strict=True))
    staying = torch.arange(len(images), device=images.device)
    logits: Tensor | None = None
    exits = torch.zeros_like(staying)
    x = model.stem(images)
    for stage, blocks in enumerate(model.stages):
        x = blocks(x)
        if limits.get(stage, NEVER) > 1:
            continue
        own = model.head(stage, x)[0].float()  # as the thresholds were found, whatever the precision
        if logits is None:
            logits = own.new_zeros(len(images), own.shape[1])
        # All samples leave at the deepest exit, even with NaN logits, which fail every comparison.
        leaving = own.softmax(1).amax(1) >= limits[stage] if stage != stages[-1] else torch.ones_like(staying).bool()
        logits[staying[leaving]], exits[staying[leaving]] = own[leaving], stages.index(stage)
        staying, x = staying[~leaving], x[~leaving]
        if not len(staying):
            break
    assert logits is not None  # the deepest exit is always run
    return logits, exits


def exit_costs(model: ResNet, image: Tensor) -> tuple[list[int], list[int]]:
    """Multiply-accumulates for one image (1, C, H, W): in the backbone from exit to exit, and in each exit's head."""
    backbone, heads = [], []
    with torch.no_grad(), rk.use_backend("reference"), FlopCounterMode(display=False) as counter:
        x, done = model.stem(image), 0
        for stage, blocks in enumerate(model.stages):
            x = blocks(x)
            if stage in model.exit_stages:
                reached = counter.get_total_flops() // 2
                model.head(stage, x)
                backbone.append(reached - done)
                done = counter.get_total_flops() // 2
                heads.append(done - reached)
    return backbone, heads


@dataclass(frozen=True)
class OperatingPoint:
    """One choice of thresholds, and its results on some images.

    Attributes:
        thresholds: one for each shallow exit; above 1 the exit is not used, and its head not run.
        accuracy: share of the images that are classified correctly.
        macs: mean multiply-accumulates an image.
        shares: share of the images that left at each exit, shallow to deep.
    """

    thresholds: list[float]
    accuracy: float
    macs: float
    shares: list[float]


def operate(
    exits: list[Tensor], labels: Tensor, costs: tuple[list[int], list[int]], thresholds: list[float]
) -> OperatingPoint:
    """The results of thresholds, from every exit's logits (N, classes) on labelled images."""
    waiting = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    right, macs, shares = 0, 0.0, []
    for logits, backbone, head, limit in zip(exits, *costs, [*thresholds, -math.inf], strict=True):
        probability, chosen = logits.softmax(1).max(1)
        leaving = waiting & ((probability >= limit) | (limit == -math.inf))
        macs += float(waiting.float().mean()) * (backbone + (head if limit <= 1 else 0))
        right += int((leaving & (chosen == labels)).sum())
        shares.append(float(leaving.float().mean()))
        waiting &= ~leaving
    return OperatingPoint(thresholds, right / len(labels), macs, shares)


def frontier(exits: list[Tensor], labels: Tensor, costs: tuple[list[int], list[int]]) -> list[OperatingPoint]:
    """The points that no other point beats in both accuracy and compute, cheapest first. A point uses some of the
    shallow exits, with one threshold for all of these: a threshold for each exit would fit validation noise."""
    points = []
    confidences = [*(i / 50 for i in range(50)), 0.99, 0.995, 0.999]
    for used in itertools.product((False, True), repeat=len(exits) - 1):
        for confidence in confidences if any(used) else confidences[:1]:
            points.append(operate(exits, labels, costs, [confidence if use else NEVER for use in used]))
    best: list[OperatingPoint] = []
    for point in sorted(points, key=lambda p: (p.macs, -p.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best


def deepest_cost(costs: tuple[list[int], list[int]]) -> int:
    """Multiply-accumulates for an image if only the deepest exit is used."""
    return sum(costs[0]) + costs[1][-1]


def calibrate(
    exits: list[Tensor],
    labels: Tensor,
    costs: tuple[list[int], list[int]],
    accuracy: float | None = None,
    macs: float | None = None,
) -> OperatingPoint:
    """Thresholds for a target, from validation images: the cheapest with at least ``accuracy``, or the most accurate
    with at most ``macs`` for an image on average.

    Raises:
        ValueError: neither or both targets are given, or no thresholds reach the target.
    """
    points = frontier(exits, labels, costs)
    if (accuracy is None) == (macs is None):
        raise ValueError(f"one target must be given, accuracy or macs, got {accuracy} and {macs}")
    if accuracy is not None:
        reaching = [point for point in points if point.accuracy >= accuracy]
        if not reaching:
            raise ValueError(f"target accuracy must be at most {points[-1].accuracy:.4f}, got {accuracy}")
        return reaching[0]
    assert macs is not None
    affordable = [point for point in points if point.macs <= macs]
    if not affordable:
        full = deepest_cost(costs)
        raise ValueError(
            f"target macs must be at least {points[0].macs / full:.3f} of the deepest exit's, got {macs / full:.3g}"
        )
    return affordable[-1]


def keeping_accuracy(exits: list[Tensor], labels: Tensor, costs: tuple[list[int], list[int]]) -> OperatingPoint:
    """The cheapest point with at least the deepest exit's accuracy."""
    deepest = operate(exits, labels, costs, [NEVER] * (len(exits) - 1)).accuracy
    return calibrate(exits, labels, costs, accuracy=deepest)
