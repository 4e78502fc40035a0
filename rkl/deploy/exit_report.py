"""What early exit saves for a finished run. Thresholds come from validation images, results from test images, both in
the run's precision."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..network.model import ResNetKL
from ..slimming.early_exit import (
    OperatingPoint,
    calibrate,
    deepest_cost,
    early_exit,
    exit_costs,
    frontier,
    keeping_accuracy,
    operate,
)
from ..training import metrics, report
from ..training.checkpoint import Run, example_image
from ..training.evaluation import autocast, collect, evaluation_batches
from ..training.files import RunError, check_writable, save_figure, to_json, write_text
from ..training.images import data_of

BATCH = 100


def evaluate_early_exit(
    run: Run, accuracy: float | None = None, macs_share: float | None = None, checkpoint: str = "last"
) -> dict[str, Any]:
    """Calibrate thresholds on the validation images, measure on the test images, write early_exit.json and its plot.

    Args:
        accuracy: accuracy to reach on the validation images. Without any target it is the deepest exit's accuracy.
        macs_share: largest mean multiply-accumulates, as a share of the deepest exit's.

    Raises:
        RunError: the model has one exit only, or the record cannot be written.
        ValueError: both targets, or one that cannot be reached.
    """
    if accuracy is not None and macs_share is not None:
        raise ValueError(f"target_macs must be left out beside target_accuracy {accuracy}, got {macs_share}")
    if not isinstance(run.model, ResNetKL):
        raise RunError(f"{run.folder}: early exit needs a model with several exits, got {run.config.model}")
    plot, file = run.folder / "plots" / "early_exit.png", run.folder / "early_exit.json"
    check_writable(plot, file)
    model, data = run.model.deploy(exits=True), data_of(run).to(run.device)
    if not len(data.val):
        raise RunError(f"{run.folder}: early exit needs validation images to calibrate on, got val_fraction 0")
    costs = exit_costs(model, example_image(run))
    full = deepest_cost(costs)
    exits, labels = collect(model, data.val, data, run.config)
    candidates = frontier(exits, labels, costs)
    if accuracy is None and macs_share is None:
        chosen = keeping_accuracy(exits, labels, costs)
    else:
        chosen = calibrate(exits, labels, costs, accuracy, None if macs_share is None else macs_share * full)

    exits, labels = collect(model, data.test, data, run.config)
    curve = [operate(exits, labels, costs, point.thresholds) for point in candidates]
    point = operate(exits, labels, costs, chosen.thresholds)
    images = [batch for batch, _ in evaluation_batches(data.test, data, BATCH)]
    with autocast(run.config, run.device):
        speed, full_speed = throughput(model, run.model.deploy(), images, chosen.thresholds)
    deepest = {"accuracy": metrics.exit_metrics(exits[-1], labels)["accuracy"], "macs": full}
    record = {
        "checkpoint": checkpoint,
        "epoch": run.facts["epoch"],
        "thresholds": chosen.thresholds,
        "validation": asdict(chosen),
        "test": asdict(point),
        "deepest": deepest,
        "images_a_second": speed,
        "deepest_images_a_second": full_speed,
        "batch": BATCH,
        "curve": [asdict(p) for p in curve],
    }
    plot_curve(curve, point, deepest, plot)
    write_text(file, to_json(record, indent=1))
    return record


@torch.no_grad()
def throughput(model: ResNetKL, whole: nn.Module, images: list[Tensor], thresholds: list[float]) -> tuple[float, float]:
    """Images a second with early exit and through the whole model: medians of five, in turns, on the same batches."""
    passes: tuple[Callable[[Tensor], object], ...] = (lambda x: early_exit(model, x, thresholds), whole)
    seconds: list[list[float]] = [[], []]
    for repeat in range(6):
        for run_batch, own in zip(passes, seconds, strict=True):
            start = time.perf_counter()
            for batch in images:
                run_batch(batch)
            if images[0].is_cuda:
                torch.cuda.synchronize(images[0].device)
            if repeat:  # the first pass warms up
                own.append(time.perf_counter() - start)
    count = sum(map(len, images))
    return tuple(count / sorted(own)[len(own) // 2] for own in seconds)  # type: ignore[return-value]


def rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that ``rkl evaluate --early-exit`` prints."""
    shares = record["test"]["shares"]
    header = ["", "accuracy", "mean MACs", "images a second", *(f"exit {i}" for i in range(1, len(shares) + 1))]
    table = []
    for name, part, speed, own in (
        ("early exit", record["test"], record["images_a_second"], shares),
        ("deepest exit", record["deepest"], record["deepest_images_a_second"], [0.0] * (len(shares) - 1) + [1.0]),
    ):
        row = [name, f"{part['accuracy']:.2%}", f"{part['macs'] / 1e6:.3g} M", f"{speed:,.0f}"]
        table.append(row + [f"{share:.1%}" for share in own])
    return header, table


def plot_curve(curve: list[OperatingPoint], chosen: OperatingPoint, deepest: dict[str, float], path: Path) -> None:
    """Plot test accuracy over mean compute, for the thresholds that are on the frontier of the validation images."""
    figure, axes = report.new_figure(8, 4.2)
    share = [100 * point.macs / deepest["macs"] for point in curve]
    axes.plot(share, [100 * point.accuracy for point in curve], "o-", color="#31688e", label="thresholds by confidence")
    axes.plot(100, 100 * deepest["accuracy"], "s", color="black", label="deepest exit only")
    axes.plot(
        100 * chosen.macs / deepest["macs"], 100 * chosen.accuracy, "*", color="#d1495b", markersize=15, label="chosen"
    )
    axes.set(xlabel="mean compute (% of the deepest exit's MACs)", ylabel="test accuracy (%)", title="Early exit")
    report.tidy(axes)
    save_figure(figure, path)
