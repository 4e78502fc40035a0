"""Measurements of a model: quality of every exit (torchmetrics), parameters, multiply-accumulates, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rkl_kernels as rk

from ..network.model import all_exits

ExitMetrics = dict[str, float]


@torch.no_grad()
def collect_exits(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Every exit's logits (N, classes) over all batches, shallow to deep, and the labels (N,). Runs in eval mode."""
    training = model.training
    model.eval()
    try:
        outputs = [(all_exits(model, images).logits, labels) for images, labels in batches]
    finally:
        model.train(training)
    exits = [torch.cat(parts).float() for parts in zip(*(logits for logits, _ in outputs), strict=True)]
    return exits, torch.cat([labels for _, labels in outputs])


def exit_metrics(logits: Tensor, labels: Tensor) -> ExitMetrics:
    """Top-1 accuracy, macro recall, macro F1, negative log likelihood and calibration error (15 bins) of one exit."""
    from torchmetrics.functional import classification  # late: it takes seconds, and a prediction needs none of it

    classes = logits.shape[1]
    probabilities = logits.softmax(1)
    return {
        "accuracy": float(classification.multiclass_accuracy(logits, labels, classes, average="micro")),
        "recall": float(classification.multiclass_recall(logits, labels, classes, average="macro")),
        "f1": float(classification.multiclass_f1_score(logits, labels, classes, average="macro")),
        "nll": float(F.cross_entropy(logits, labels)),
        "ece": float(classification.multiclass_calibration_error(probabilities, labels, classes, n_bins=15)),
    }


def confusion(logits: Tensor, labels: Tensor) -> list[list[int]]:
    """Counts by true class (row) and predicted class (column)."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(logits, labels, logits.shape[1]).tolist()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image (1, C, H, W), in eval mode."""
    training = model.training
    model.eval()
    # The reference path, since PyTorch's counter counts PyTorch's operators.
    with rk.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(image)
    model.train(training)
    return counter.get_total_flops() // 2


LATENCY_REPEATS = 15
"""A latency is the median of this many forward passes."""


@torch.no_grad()
def measure_latency(model: nn.Module, images: Tensor) -> float:
    """Median milliseconds of a forward pass over ``images``, in eval mode, after two passes to warm up."""
    return measure_latencies([model], images)[0]


def measure_latencies(models: list[nn.Module], images: Tensor) -> list[float]:
    """As :func:`measure_latency`, for several models in turns, so that the machine's ups and downs affect all alike."""
    samples = latency_samples(models, [images] * len(models), LATENCY_REPEATS)
    return [statistics.median(own) for own in samples]


@torch.no_grad()
def latency_samples(models: list[nn.Module], images: list[Tensor], repeats: int) -> list[list[float]]:
    """Milliseconds of each of ``repeats`` forward passes of each model over its own images, all models in turns, after
    two passes to warm up."""
    training = [model.training for model in models]
    times: list[list[float]] = [[] for _ in models]
    for model in models:
        model.eval()
    for repeat in range(repeats + 2):
        for model, batch, own in zip(models, images, times, strict=True):
            _synchronize(batch)
            start = time.perf_counter()
            model(batch)
            _synchronize(batch)
            if repeat >= 2:
                own.append(1000 * (time.perf_counter() - start))
    for model, mode in zip(models, training, strict=True):
        model.train(mode)
    return times


def _synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
