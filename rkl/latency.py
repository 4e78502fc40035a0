"""Latency of a table's rows, all measured in turns when the page is written: what ran at another time on a shared
machine cannot be compared."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import torch
from torch import nn

from . import metrics, prune
from .build import build_model
from .config import from_plain
from .evaluation import default_device
from .records import Results, Run

BATCH = 16
REPEATS = 15


@dataclass(frozen=True)
class Latency:
    """Milliseconds for a batch of 16: the median and the quartiles of what was measured."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def rebuilt(run: Run) -> nn.Module | None:
    """The deployed network of a run with its channels and arbitrary weights, on which speed does not depend; None for a
    record that does not hold its channels."""
    if "plan" not in run.metrics:
        return None
    config, (channels, size) = from_plain(run.config), run.metrics["image"]
    model = build_model(replace(config, weights=None), len(run.metrics["classes"]), channels, size)
    prune.apply_plan(model, run.metrics["plan"])
    return model.eval().deploy() if hasattr(model, "deploy") else model.eval()


def measure(results: Results) -> dict[str, Latency]:
    """The latency of each row's first run, the rows in turns; rows whose records are too old are left out."""
    found = {row: rebuilt(runs[0]) for row, runs in results.rows.items()}
    models = {row: model.to(default_device()) for row, model in found.items() if model is not None}
    if not models:
        return {}
    channels, size = next(
        run.metrics["image"] for runs in results.rows.values() for run in runs if "plan" in run.metrics
    )
    images = torch.randn(BATCH, channels, size, size, device=default_device())
    samples = metrics.latency_samples(list(models.values()), images, REPEATS)
    quartiles = [statistics.quantiles(own, n=4) for own in samples]
    return {row: Latency(middle, low, high) for row, (low, middle, high) in zip(models, quartiles, strict=True)}
