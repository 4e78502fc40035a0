"""Latency of a table's rows. All are measured in turns when the page is written, since times that were measured at
different moments on a shared machine cannot be compared."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..config import from_plain
from ..network.build import build_model
from ..network.deployed import deployed
from ..slimming.channels import apply_plan
from ..training import metrics
from ..training.evaluation import default_device
from .records import Results, Run

BATCH = 16
REPEATS = 15


@dataclass(frozen=True)
class Latency:
    """Milliseconds for a batch of 16: the median and the quartiles of the measured times."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def rebuilt(run: Run) -> nn.Module:
    """A run's deployed network with its channels. The weights are arbitrary, since speed does not depend on them."""
    config, (channels, size) = from_plain(run.config), run.metrics["image"]
    model = build_model(replace(config, weights=None), len(run.metrics["classes"]), channels, size)
    apply_plan(model, run.metrics["plan"])
    return deployed(model.eval())


def measure(found: list[Results]) -> list[dict[str, Latency]]:
    """For each table, the latency of each row's first run, on images of the run's size. All rows on one data set are
    measured in turns; a row that several tables share is measured once. Rows whose records are too old to have a plan
    are left out."""
    measured: dict[str, dict[str, Latency]] = {}
    for data in dict.fromkeys(results.data for results in found):
        rows = {row: runs[0] for results in found if results.data == data for row, runs in results.rows.items()}
        measured[data] = _in_turns({row: run for row, run in rows.items() if "plan" in run.metrics})
    return [{row: own for row, own in measured[r.data].items() if row in r.rows} for r in found]


def _in_turns(runs: dict[str, Run]) -> dict[str, Latency]:
    device = default_device()
    models = [rebuilt(run).to(device) for run in runs.values()]
    shapes = [run.metrics["image"] for run in runs.values()]
    images = [torch.randn(BATCH, channels, size, size, device=device) for channels, size in shapes]
    samples = metrics.latency_samples(models, images, REPEATS)
    quartiles = [statistics.quantiles(own, n=4) for own in samples]
    return {row: Latency(middle, low, high) for row, (low, middle, high) in zip(runs, quartiles, strict=True)}
