"""Classifying image files with a run's model."""

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
from ..training.files import RunError, read_json

BATCH = 64
"""Images that are in memory at once."""


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes, first first, with their probabilities; the exit that gave them (from 1) of how many."""

    top: list[tuple[str, float]]
    exit: int
    exits: int


def thresholds_of(run: Run, checkpoint: str) -> list[float] | None:
    """The thresholds that validation images gave this checkpoint's model, as it is now: those of the last `rkl evaluate
    --early-exit`, or those its training ended with; None where there are none."""
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
    """(C, H, W) float32, made as training makes images from files: upright, short side scaled, cropped, normalised.

    Raises:
        DataError: no such file, or none that is an image.
    """
    pixels = image_tensor(path, run.facts["image_size"], run.facts["channels"]).float() / 255
    mean, std = (torch.tensor(run.facts[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def predict(run: Run, paths: list[Path], thresholds: list[float] | None = None) -> Iterator[Prediction | ValueError]:
    """For each image, in order, the five likeliest classes, or what is wrong with it: a bad file costs no other answer.

    Args:
        thresholds: an image leaves at the first exit whose top probability reaches the exit's; the deepest takes the
            rest, and all of them by default.
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
    if isinstance(run.model, ResNet):
        count = len(run.model.exit_stages)
        logits, exits = early_exit(run.model, images, thresholds or [NEVER] * (count - 1))
    else:
        count, logits, exits = 1, run.model(images), torch.zeros(len(images), dtype=torch.long)
    classes = run.facts["classes"]
    probabilities, indices = logits.softmax(1).topk(min(5, len(classes)))
    return [
        Prediction([(classes[i], p) for p, i in zip(chances, chosen, strict=True)], exit + 1, count)
        for chances, chosen, exit in zip(probabilities.tolist(), indices.tolist(), exits.tolist(), strict=True)
    ]
