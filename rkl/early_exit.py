"""Early exit: a sample leaves at the first head that is confident enough, and the batch goes on without it."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import ResNet


@torch.no_grad()
def early_exit(model: ResNet, images: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
    """Classify a batch, each sample by the first exit whose top probability reaches its threshold.

    After each head the samples that stay are compacted, so those that left cost nothing more. In eval mode no layer
    looks across samples, so each sample's result is that of a batch of its own.

    Args:
        images: (N, C, H, W), normalised.
        thresholds: one for each exit but the deepest, which takes whoever is left.

    Returns:
        logits (N, classes) of the exit each sample left from, and that exit's number (N,), from 0.

    Raises:
        ValueError: as many thresholds as shallow exits are needed, or the model is in training mode.
    """
    stages = model.exit_stages
    if len(thresholds) != len(stages) - 1:
        raise ValueError(f"thresholds must be one for each of {len(stages) - 1} shallow exits, got {len(thresholds)}")
    if model.training:
        raise ValueError("model must be in eval mode, got training mode; call model.eval()")
    # Above 1 no probability gets: such an exit's head need not be run.
    limits = dict(zip(stages, [*thresholds, 0.0], strict=True))
    staying = torch.arange(len(images), device=images.device)
    logits = exits = None
    x = model.stem(images)
    for stage, blocks in enumerate(model.stages):
        x = blocks(x)
        if limits.get(stage, 2.0) > 1:
            continue
        own, _ = model.head(stage, x)
        if logits is None:
            logits, exits = own.new_zeros(len(images), own.shape[1]), torch.zeros_like(staying)
        leaving = own.softmax(1).amax(1) >= limits[stage]
        logits[staying[leaving]], exits[staying[leaving]] = own[leaving], stages.index(stage)
        staying, x = staying[~leaving], x[~leaving]
        if not len(staying):
            break
    return logits, exits
