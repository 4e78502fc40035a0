"""Classifying image files with a run's model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .checkpoint import Run, RunError
from .early_exit import early_exit
from .model import ResNet


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes, first first, with their probabilities; the exit that gave them (from 1) of how many."""

    top: list[tuple[str, float]]
    exit: int
    exits: int


def read_image(path: Path, run: Run) -> Tensor:
    """(1, C, H, W) float32, resized and normalised as in training.

    Raises:
        RunError: no such file, or none that is an image.
    """
    size = run.facts["image_size"]
    try:
        with Image.open(path) as image:
            pixels = image.convert("L" if run.facts["channels"] == 1 else "RGB").resize(
                (size, size), Image.Resampling.BILINEAR
            )
    except FileNotFoundError:
        raise RunError(f"{path}: an image must be there, got no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise RunError(f"{path}: must be a whole image file, got: {error}") from error
    values = torch.from_numpy(np.array(pixels)).view(size, size, -1).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(run.facts[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    return (values - mean) / std


@torch.no_grad()
def predict(run: Run, paths: list[Path], confidence: float = 0.9) -> list[Prediction]:
    """The five likeliest classes of each image, by the first exit whose top probability reaches ``confidence``."""
    images = torch.cat([read_image(path, run) for path in paths])
    if isinstance(run.model, ResNet):
        count = len(run.model.exit_stages)
        logits, exits = early_exit(run.model, images, [confidence] * (count - 1))
    else:
        count, logits, exits = 1, run.model(images), torch.zeros(len(images), dtype=torch.long)
    classes = run.facts["classes"]
    probabilities, indices = logits.softmax(1).topk(min(5, len(classes)))
    return [
        Prediction(
            [(classes[i], float(p)) for p, i in zip(chances, chosen.tolist(), strict=True)], int(exit) + 1, count
        )
        for chances, chosen, exit in zip(probabilities, indices, exits, strict=True)
    ]
