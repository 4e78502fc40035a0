"""Measures a model on a split, without augmentation and in the run's precision, on all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import data as datasets
from ..config import Config, Precision
from ..data import Dataset, Split
from ..network.deployed import deployed
from . import metrics

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # takes seconds, and a prediction needs none of it


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision_on(config: Config, device: torch.device) -> Precision:
    """The run's precision. The default is bf16-mixed on a GPU and float32 elsewhere."""
    return config.precision or ("bf16-mixed" if device.type == "cuda" else "32-true")


def autocast(config: Config, device: torch.device) -> AbstractContextManager[None]:
    """A context manager for the precision in which a run's models are evaluated, which is that of training."""
    precision = precision_on(config, device)
    if precision == "32-true":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16-mixed" else torch.float16)


def evaluation_batches(
    split: Split, data: Dataset, batch_size: int = 500, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in the split's own order, without augmentation."""
    return datasets.batches(
        split, batch_size, num_classes=data.num_classes, shuffle=False, rank=rank, world_size=world_size
    )


def batch_size_of(images: int, world_size: int) -> int:
    """The number of images in a batch: at most 500, and few enough that every process has a batch."""
    return min(500, max(1, images // world_size))


def collect(model: nn.Module, split: Split, data: Dataset, config: Config) -> tuple[list[Tensor], Tensor]:
    """Every exit's logits (N, classes), shallow to deep, and the labels (N,), on the split's device, in the run's
    precision. If several processes train, each does its share and gets all results, in another order."""
    rank, world_size = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = batch_size_of(len(split), world_size)
    with autocast(config, split.images.device):
        exits, labels = metrics.collect_exits(model, evaluation_batches(split, data, size, rank, world_size))
    if world_size > 1:
        from torchmetrics.utilities.distributed import gather_all_tensors  # late, as in metrics.py

        *exits, labels = (torch.cat(gather_all_tensors(values)) for values in (*exits, labels))
    return exits, labels


def evaluate(model: nn.Module, split: Split, data: Dataset, config: Config) -> list[metrics.ExitMetrics]:
    """The metrics of every exit, shallow to deep. The list is empty for a split without images."""
    if not len(split):
        return []
    exits, labels = collect(model, split, data, config)
    return [metrics.exit_metrics(logits, labels) for logits in exits]


def size_of(model: nn.Module, example: Tensor) -> dict[str, float]:
    """Parameters before and after deployment, multiply-accumulates for one image, and milliseconds for ``example``."""
    in_use = deployed(model)
    return {
        "parameters": metrics.count_parameters(model),
        "deployed_parameters": metrics.count_parameters(in_use),
        "macs": metrics.count_macs(model, example[:1]),
        "latency_ms": metrics.measure_latency(in_use, example),
        "latency_batch": len(example),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def peak_memory(fabric: Fabric) -> int:
    """The most bytes that one of the present processes has held: GPU memory on a GPU, else resident memory."""
    if fabric.device.type == "cuda":
        own = torch.cuda.max_memory_allocated(fabric.device)
    else:
        import resource  # here, as Windows has no such module

        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    most = fabric.all_reduce(torch.tensor(own, device=fabric.device), reduce_op="max")
    assert isinstance(most, Tensor)
    return int(most)


def process_facts(config: Config, fabric: Fabric) -> dict[str, Any]:
    """What a run's record tells of the present processes."""
    return {
        "peak_memory_bytes": peak_memory(fabric),
        "device": device_name(fabric.device),
        "precision": precision_on(config, fabric.device),
    }


def over_processes(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of a run that went on in several processes, in their order: the largest memory, and every device and
    precision. Lines of an older log have no such facts."""
    names = {
        name: ", ".join(dict.fromkeys(part[name] for part in parts if name in part)) for name in ("device", "precision")
    }
    return {"peak_memory_bytes": max(part.get("peak_memory_bytes", 0) for part in parts)} | names
