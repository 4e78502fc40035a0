"""Classifies image files with a run's model, in the run's precision."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data import DataError
from ..data.formats import image_tensor
from ..network.model import ResNet
from ..slimming.early_exit import NEVER, early_exit
from ..training.checkpoint import Run
from ..training.evaluation import autocast
from ..training.files import RunError, read_json

BATCH = 64
"""The most images that are in memory at once."""


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes in order, with probabilities. ``exit``: the exit (from 1) of ``exits`` that gave them."""

    top: list[tuple[str, float]]
    exit: int
    exits: int


def thresholds_of(run: Run, checkpoint: str) -> list[float] | None:
    """The early exit thresholds of this checkpoint's model, from validation images. They are those of the last `rkl
    evaluate --early-exit` or else of the end of training; None if neither is of the checkpoint's epoch."""
    for name, key in (("early_exit.json", "checkpoint"), ("metrics.json", "tested")):
        file = run.folder / name
        record = read_json(file, "a run's record") if file.is_file() else {}
        of_this = record.get(key) == checkpoint and record.get("epoch") == run.facts["epoch"]
        if of_this and record.get("thresholds"):
            return _checked_thresholds(file, record["thresholds"], run)
    return None


def _checked_thresholds(file: Path, thresholds: object, run: Run) -> list[float]:
    count = len(run.model.exit_stages) - 1 if isinstance(run.model, ResNet) else 0
    numbers = isinstance(thresholds, list) and all(type(value) in (int, float) for value in thresholds)
    if not isinstance(thresholds, list) or not numbers or len(thresholds) != count:
        raise RunError(f"{file}: thresholds must be {count} numbers, got {reprlib.repr(thresholds)}")
    return thresholds


def read_image(path: Path, run: Run) -> Tensor:
    """An image (C, H, W) float32, prepared as in training: upright, short side scaled, cropped, normalised.

    Raises:
        DataError: no such file, or the file is no image.
    """
    pixels = image_tensor(path, run.facts["image_size"], run.facts["channels"]).float() / 255
    mean, std = (torch.tensor(run.facts[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def predict(run: Run, paths: list[Path], thresholds: list[float] | None = None) -> Iterator[Prediction | ValueError]:
    """For each image in order, the five likeliest classes, or the error of its file. A bad file spoils no other answer.

    Args:
        thresholds: one for each shallow exit. An image leaves at the first exit whose threshold its top probability
            reaches, else at the deepest exit; by default all images leave there.
    """
    for start in range(0, len(paths), BATCH):
        read: list[Tensor | ValueError] = []
        for path in paths[start : start + BATCH]:
            try:
                read.append(read_image(path, run))
            except DataError as error:
                read.append(error)
        images = [image for image in read if isinstance(image, Tensor)]
        answers = iter(_classified(run, torch.stack(images), thresholds) if images else [])
        for path, image in zip(paths[start : start + BATCH], read, strict=True):
            answer = image if isinstance(image, ValueError) else next(answers)
            finite = isinstance(answer, ValueError) or math.isfinite(answer.top[0][1])
            yield answer if finite else RunError(f"{path}: the model's outputs must be finite, got nan")


@torch.no_grad()
def _classified(run: Run, images: Tensor, thresholds: list[float] | None) -> list[Prediction]:
    images = images.to(run.device)
    with autocast(run.config, run.device):
        if isinstance(run.model, ResNet):
            count = len(run.model.exit_stages)
            logits, exits = early_exit(run.model, images, thresholds or [NEVER] * (count - 1))
        else:
            count, logits, exits = 1, run.model(images).float(), torch.zeros(len(images), dtype=torch.long)
    classes = run.facts["classes"]
    probabilities, indices = logits.softmax(1).topk(min(5, len(classes)))
    return [
        Prediction([(classes[i], p) for p, i in zip(chances, chosen, strict=True)], exit + 1, count)
        for chances, chosen, exit in zip(probabilities.tolist(), indices.tolist(), exits.tolist(), strict=True)
    ]
