"""The trainer: one plain loop on Lightning Fabric, which brings device, precision and DistributedDataParallel."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import checkpoint, metrics, prune, report
from . import data as datasets
from .build import build_model
from .config import Config, to_plain
from .data import Dataset, Split
from .distill import add_l1_gradient, gamma_l1, training_losses
from .model import Exits
from .run_log import RunLog, TrainingProgress


def learning_rate(config: Config, progress: float) -> float:
    """The learning rate after ``progress`` epochs: a tenth after each third, or half a cosine; linear warm-up."""
    warm = min(1.0, progress / config.warmup) if config.warmup else 1.0
    share = progress / config.epochs
    if config.schedule == "thirds":
        return config.lr * warm * 0.1 ** int(3 * share + 1e-9)
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * share))


def load_data(config: Config) -> Dataset:
    """The data set that a configuration names."""
    options = {key: getattr(config, key) for key in ("train_size", "test_size", "imbalance", "download")}
    return datasets.load(config.data, config.data_root, config.image_size, config.val_fraction, config.seed, **options)


class Learner:
    """What training changes: the model, its moving average if one is kept, and the optimiser."""

    def __init__(self, config: Config, data: Dataset, device: torch.device, start: nn.Module | None = None) -> None:
        torch.manual_seed(config.seed)
        model = start or build_model(config, data.num_classes, data.channels, data.image_size)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=self.memory_format)
        follow = get_ema_multi_avg_fn(config.ema)
        self.average = AveragedModel(self.model, multi_avg_fn=follow, use_buffers=True) if config.ema else None
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )

    @property
    def evaluated(self) -> nn.Module:
        """The model whose quality counts: the moving average, where one is kept."""
        return self.average.module if self.average else self.model

    def prune(self, example: Tensor, ratio: float) -> None:
        """One cut of the model, and of all that follows it."""
        prune.prune(self.model, example, ratio, self.optimizer, [self.average.module] if self.average else [])

    def tensors(self) -> dict[str, Tensor]:
        """Everything a run needs to go on, by name."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum.{name}"] = buffer
        if self.average:
            tensors |= {f"ema.{name}": value for name, value in self.average.module.state_dict().items()}
            tensors["averaged"] = self.average.n_averaged
        return tensors

    def restore(self, folder: Path) -> dict[str, Any]:
        """Put the last checkpoint's tensors where :meth:`tensors` took them from; the checkpoint's facts."""
        tensors, facts = checkpoint.load(folder, "last")
        source = folder / "last.json"
        checkpoint.restore_model(self.model, checkpoint.part(tensors, "model."), facts["plan"], source)
        # The plan exchanged parameters for narrower ones; the optimiser, which has no state yet, takes those.
        self.optimizer.param_groups[0]["params"] = list(self.model.parameters())
        for name, parameter in self.model.named_parameters():
            if f"momentum.{name}" in tensors:
                buffer = torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"momentum.{name}"])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        if self.average:
            checkpoint.restore_model(self.average.module, checkpoint.part(tensors, "ema."), facts["plan"], source)
            self.average.n_averaged.copy_(tensors["averaged"])
        return facts


def train(config: Config, resume: bool = False, start: nn.Module | None = None) -> Path:
    """Train one model, evaluate it once on the test images, and write the run's folder.

    Interrupted at any moment, the run goes on with ``resume`` from its last whole epoch, to the same result.
    ``start`` is a model of this configuration, pruned or not, to train on from; a fresh one by default.

    Returns:
        The run's folder: config.yaml, log.jsonl, TensorBoard events, checkpoints, metrics.json, plots, report.md.

    Raises:
        ValueError: the configuration, the data or the folder cannot be used; one line that says why.
    """
    fabric = Fabric(accelerator="auto", devices=config.devices, precision=config.precision)
    fabric.launch()
    data = load_data(config)
    splits = {name: getattr(data, name).to(fabric.device) for name in ("train", "val", "test")}
    learner = Learner(config, data, fabric.device, start)
    example = next(evaluation_batches(splits["val"], data, 16))[0].to(memory_format=learner.memory_format)
    log = RunLog(config, resume, writing=fabric.is_global_zero)
    facts = first_facts(config, data)
    if resume and log.has_checkpoint:
        facts = learner.restore(log.checkpoints)
    log.start(facts["epoch"])

    wrapped, stepper = fabric.setup(learner.model, learner.optimizer)
    with log.progress(config.epochs, facts["epoch"]) as progress:
        for epoch in range(facts["epoch"], config.epochs):
            started = time.perf_counter()
            if epoch in config.cut_epochs:
                before = state_at_cut(learner.evaluated, example, splits["val"], data, fabric)
                learner.prune(example, cut_ratio(config, learner.model, example[:1], facts["cuts"], before["macs"]))
                after = state_at_cut(learner.evaluated, example, splits["val"], data, fabric)
                facts["cuts"].append({"epoch": epoch, "before": before, "after": after})
                facts["best"] = None  # an epoch before the cut was of another, larger model
                progress.cut(before, after)
                wrapped, stepper = fabric.setup(learner.model, learner.optimizer)
            row = train_epoch(config, fabric, learner, wrapped, stepper, splits["train"], data, epoch, progress)
            row["val"] = evaluate(learner.evaluated, splits["val"], data, fabric)
            row["seconds"] = time.perf_counter() - started
            accuracy = row["val"][-1]["accuracy"]
            best = facts["best"] is None or accuracy > facts["best"]["accuracy"]
            if best:
                facts["best"] = {"epoch": epoch + 1, "accuracy": accuracy}
            facts |= {"epoch": epoch + 1, "plan": prune.channel_plan(learner.model)}
            if fabric.is_global_zero:
                log.write(row)
                for name in ("best", "last") if best else ("last",):
                    checkpoint.save(log.checkpoints, name, learner.tensors(), facts)
            progress.epoch(accuracy)

    if fabric.is_global_zero:
        finish(config, learner.evaluated, data, splits, facts, log, fabric)
    return config.out


def first_facts(config: Config, data: Dataset) -> dict[str, Any]:
    """What a checkpoint's JSON says before the first epoch: all that using the model without its data takes."""
    return {
        "config": to_plain(config),
        "classes": data.classes,
        "channels": data.channels,
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "epoch": 0,
        "cuts": [],
        "best": None,
    }


def cut_ratio(config: Config, model: nn.Module, image: Tensor, cuts: list[dict[str, Any]], macs: float) -> float:
    """The ratio of the cut that follows ``cuts``, on a model of so many multiply-accumulates: prune_ratio, or the least
    that takes this cut's part of the way to prune_macs."""
    if config.prune_macs is None:
        return config.prune_ratio
    first = cuts[0]["before"]["macs"] if cuts else macs
    limit = first * config.prune_macs ** ((len(cuts) + 1) / len(config.cut_epochs))
    target = f"prune_macs {config.prune_macs}"
    return prune.smallest_ratio(model, image, lambda slim: metrics.count_macs(slim, image) <= limit, target)


def train_epoch(
    config: Config,
    fabric: Fabric,
    learner: Learner,
    wrapped: nn.Module,
    stepper: torch.optim.Optimizer,
    split: Split,
    data: Dataset,
    epoch: int,
    progress: TrainingProgress,
) -> dict[str, Any]:
    """One pass over the training images; the log's row of it: learning rate, each loss term's mean, data's share."""
    # Seeded anew each epoch: what a resumed run draws (dropout, say) is what an uninterrupted one would have.
    torch.manual_seed(config.seed * 1_000_003 + epoch)
    weights = datasets.class_weights(split, data.num_classes).to(fabric.device) if config.class_weights else None
    # The same number of steps on every process.
    steps = max(1, len(split) // fabric.world_size // config.batch_size)
    batches = training_batches(config, split, data, epoch, rank=fabric.global_rank, world_size=fabric.world_size)
    sums: dict[str, Tensor] = {}
    waited, seen, started = 0.0, 0, time.perf_counter()
    learner.model.train()
    for step in range(steps):
        asked = time.perf_counter()
        images, labels = next(batches)
        images = images.to(memory_format=learner.memory_format)
        waited += time.perf_counter() - asked
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch + step / steps)
        output = wrapped(images)
        losses = training_losses(
            output if isinstance(output, Exits) else Exits((output,)), labels, config.loss, weights
        )
        stepper.zero_grad()
        fabric.backward(torch.stack(list(losses.values())).sum())
        if config.loss.l1:
            add_l1_gradient(learner.model, config.loss.l1)
        stepper.step()
        if learner.average:
            learner.average.update_parameters(learner.model)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss.detach() * len(images)
        seen += len(images)
        progress.step(epoch, step, steps)
    terms = {name: float(total) / seen for name, total in sums.items()}
    terms["l1"] = config.loss.l1 * gamma_l1(learner.model)
    total = sum(terms.values())
    if not math.isfinite(total):
        raise ValueError(f"epoch {epoch + 1}: the training loss must be finite, got {total}; lower lr ({config.lr})")
    return {
        "epoch": epoch + 1,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "losses": terms | {"total": total},
        "data_share": waited / (time.perf_counter() - started),
    }


def training_batches(
    config: Config, split: Split, data: Dataset, epoch: int, **options: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's batches as the configuration mixes them; ``options`` go to :func:`rkl.data.batches`."""
    return datasets.batches(
        split,
        config.batch_size,
        num_classes=data.num_classes,
        augment=config.augment,
        cutmix=config.cutmix,
        cutout=config.cutout,
        sampling=config.sampling,
        seed=config.seed,
        epoch=epoch,
        **options,
    )


def evaluation_batches(split: Split, data: Dataset, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in the split's own order, as they are."""
    return datasets.batches(split, batch_size, num_classes=data.num_classes, shuffle=False)


def evaluate(model: nn.Module, split: Split, data: Dataset, fabric: Fabric) -> list[metrics.ExitMetrics]:
    """Metrics of every exit, shallow to deep."""
    with fabric.autocast():
        exits, labels = metrics.collect_exits(model, evaluation_batches(split, data))
    return [metrics.exit_metrics(logits, labels) for logits in exits]


def state_at_cut(model: nn.Module, example: Tensor, val: Split, data: Dataset, fabric: Fabric) -> dict[str, float]:
    """The model's size, latency and validation accuracy, as reported before and after a cut."""
    return size_of(model, example) | {"val_accuracy": evaluate(model, val, data, fabric)[-1]["accuracy"]}


def size_of(model: nn.Module, example: Tensor) -> dict[str, float]:
    """Parameters, those left after deployment, multiply-accumulates an image, and milliseconds for ``example``."""
    deployed = model.deploy() if hasattr(model, "deploy") else model
    return {
        "parameters": metrics.count_parameters(model),
        "deployed_parameters": metrics.count_parameters(deployed),
        "macs": metrics.count_macs(model, example[:1]),
        "latency_ms": metrics.measure_latency(deployed, example),
        "latency_batch": len(example),
    }


def finish(
    config: Config,
    model: nn.Module,
    data: Dataset,
    splits: dict[str, Split],
    facts: dict[str, Any],
    log: RunLog,
    fabric: Fabric,
) -> None:
    """Look at the test images, once, and write what the run came to."""
    exits, labels = metrics.collect_exits(model, evaluation_batches(splits["test"], data))
    example = next(evaluation_batches(splits["test"], data, 16))[0]
    best = checkpoint.open_run(config.out, "best").model.to(fabric.device)
    rows = log.rows()
    record = {
        "model": config.model,
        "data": config.data,
        "seed": config.seed,
        "epoch": config.epochs,
        "test": [metrics.exit_metrics(logits, labels) for logits in exits],
        "test_images": len(labels),
        "test_looked_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "best": facts["best"] | {"test": evaluate(best, splits["test"], data, fabric)},
        "val": rows[-1]["val"],
        "training_loss": rows[-1]["losses"],
        "size": size_of(model, example),
        "cuts": facts["cuts"],
        "seconds": sum(row["seconds"] for row in rows),
        "data_share": sum(row["data_share"] * row["seconds"] for row in rows) / sum(row["seconds"] for row in rows),
        "peak_memory_bytes": peak_memory(fabric.device),
        "device": str(fabric.device),
        "confusion": metrics.confusion(exits[-1], labels),
        "classes": data.classes,
    }
    checkpoint.write_text(config.out / "metrics.json", json.dumps(record, indent=1))
    report.write_report(config.out)


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: on the GPU where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
