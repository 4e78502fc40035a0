"""The trainer: one plain loop on Lightning Fabric, which provides device, precision and DistributedDataParallel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from rkl_kernels.allocator import keep_freed_memory, return_gaps

from .. import data as datasets
from ..config import Config, to_plain
from ..data import Dataset
from ..distill import gamma_l1, training_losses
from ..ignored import check_ignored
from ..network.model import Exits, ResNetKL
from ..paths import check_apart
from ..slimming import early_exit
from ..slimming.channels import channel_plan
from . import checkpoint, metrics, report
from .cuts import cut_ratio
from .evaluation import collect, evaluate, evaluation_batches, over_processes, process_facts, size_of
from .files import RunError, read_json, to_json, write_text
from .guard import StepGuard, check_cutout, check_cuts, check_finite, check_splits, in_one_line
from .images import check_data, load_data
from .learner import Learner, make_fabric
from .run_log import RunLog, TrainingProgress

TIMED = 16
"""One step in this many is timed. Timing waits for the device, which would cost too much in every step."""
GAP_STEPS = 100
"""Steps, counted over all epochs, between two returns of the heap's gaps. A returned page costs a page fault when it is
used next."""
TAYLOR_BATCHES = 8
"""Batches whose gradients rank the channels of a cut."""


def train(config: Config, resume: bool = False, start: nn.Module | None = None) -> Path | None:
    """Train one model, evaluate it once on the test images, and write the run's folder.

    Args:
        resume: go on with a run that was interrupted at any moment, from its last whole epoch, to the same result.
        start: a model of this configuration, pruned or not, to train further; a fresh model by default.

    Returns:
        The run's folder, with config.yaml, log.jsonl, TensorBoard events, checkpoints, metrics.json, plots and
        report.md. With several devices only one process writes it, and None is returned in the others.

    Raises:
        ValueError: the configuration, the data or the folder cannot be used. The message is one line that says why, and
            nothing is left in the folder.
    """
    check_apart(config.out, config.data)
    # Every process makes all checks before it meets the others, so none writes before all have checked.
    fabric = make_fabric(config)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    with in_one_line(config, fabric):
        data = load_data(config)
    steps_an_epoch(config, len(data.train))
    check_splits(config, data)
    log = RunLog(config, resume, takes_resume=start is None)
    resumed = resume and log.has_checkpoint
    if not resumed and start is None:
        check_ignored(config)
        check_cutout(config, data)
    with in_one_line(config, fabric):
        data = data.to(fabric.device)
        learner = Learner(config, data, fabric, start, resumed)
        facts = first_facts(config, data) | (learner.restore(log.checkpoints) if resumed else {})
        check_data(config.out, facts, data)
    if finished(config, facts) and is_tested(config, facts):  # the test images are used only once
        return reported(config, fabric)
    if not resumed:
        check_cuts(config, learner.model, data)
    fabric.launch()
    fabric.barrier()
    if resumed and fabric.is_global_zero:
        log.warn_of_precision(fabric.device)
    with log.opened(facts["epoch"], writing=fabric.is_global_zero), in_one_line(config, fabric, log):
        if start is not None:
            learner = saved(learner, config, data, facts, log)
        run_epochs(config, fabric, learner, data, facts, log)
        record = finish(config, learner, data, facts, log)
        if fabric.is_global_zero:
            write_text(config.out / "metrics.json", to_json(record, indent=1))
        return reported(config, fabric)


def reported(config: Config, fabric: Fabric) -> Path | None:
    """Write the report from the run's records and return the run's folder; None in processes that do not write."""
    if not fabric.is_global_zero:
        return None
    report.write_report(config.out)
    return config.out


def saved(learner: Learner, config: Config, data: Dataset, facts: dict[str, Any], log: RunLog) -> Learner:
    """Save a checkpoint, and return the learner restored from it. A run that is stopped in its first epoch goes on from
    it. The filters, strides included, are then those of a resumed run; strides decide how products are rounded."""
    if learner.fabric.is_global_zero:
        checkpoint.save(log.checkpoints, "last", learner.tensors(), facts | learner.facts())
    learner.fabric.barrier()
    restored = Learner(config, data, learner.fabric, resumed=True)
    restored.restore(log.checkpoints)
    return restored


def is_tested(config: Config, facts: dict[str, Any]) -> bool:
    """Whether the run has a record of this epoch."""
    record = config.out / "metrics.json"
    return record.is_file() and read_json(record, "a run's record").get("epochs") == facts["epoch"]


def first_facts(config: Config, data: Dataset) -> dict[str, Any]:
    """A checkpoint's JSON before the first epoch. It has all that is needed to use the model without its data."""
    return {
        "config": to_plain(config),
        "classes": data.classes,
        "channels": data.channels,
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "fingerprint": data.fingerprint,
        "epoch": 0,
        "cuts": [],
        "best": None,
    }


def run_epochs(
    config: Config, fabric: Fabric, learner: Learner, data: Dataset, facts: dict[str, Any], log: RunLog
) -> None:
    """Train from the epoch in ``facts`` to the last one, with the cuts and checkpoints. Updates ``facts``."""
    learner.wrap()
    with log.progress(config.epochs, facts["epoch"]) as progress:
        while not finished(config, facts):
            epoch, started = facts["epoch"], time.perf_counter()
            if epoch in config.cut_epochs:
                facts["cuts"].append(cut(config, learner, data, facts))
                facts["best"] = None  # epochs before the cut belong to a larger model
                progress.cut(facts["cuts"][-1])
            row = train_epoch(config, fabric, learner, data, epoch, progress)
            learner.agree()
            row["val"] = evaluate(learner.evaluated, data.val, data, config)
            row["seconds"] = time.perf_counter() - started
            row |= process_facts(config, fabric)  # a resumed run is not to forget them
            facts |= {"epoch": epoch + 1} | learner.facts()
            better = note_best(facts, row["val"])
            if fabric.is_global_zero:
                log.write(row)
                for name in ("best", "last") if better else ("last",):
                    checkpoint.save(log.checkpoints, name, learner.tensors(), facts)
            progress.epoch(row["val"])


def finished(config: Config, facts: dict[str, Any]) -> bool:
    """Whether the last epoch is done, or ``patience`` epochs since the last cut were no better. No cut is left out."""
    stale = facts["epoch"] - facts["best"]["epoch"] if facts["best"] else 0
    cut = facts["epoch"] > max(config.cut_epochs, default=-1)
    return facts["epoch"] >= config.epochs or bool(config.patience and cut and stale >= config.patience)


def note_best(facts: dict[str, Any], val: list[metrics.ExitMetrics]) -> bool:
    """If the deepest head of the epoch just done is the best by validation since the last cut, note the epoch and
    return True."""
    if not val or (facts["best"] and val[-1]["accuracy"] <= facts["best"]["accuracy"]):
        return False
    facts["best"] = {"epoch": facts["epoch"], "accuracy": val[-1]["accuracy"]}
    return True


def steps_an_epoch(config: Config, images: int) -> int:
    """The number of steps in an epoch, the same for every process. Fewer images than a batch make one short batch.

    Raises:
        ValueError: there are not enough images for one step.
    """
    batches = max(1, images // config.batch_size) // config.devices
    steps = batches // config.accumulate
    if not steps:
        raise ValueError(
            f"batch_size x accumulate x devices must be at most the {images} training images, got "
            f"{config.batch_size} x {config.accumulate} x {config.devices}"
        )
    return steps


def train_epoch(
    config: Config, fabric: Fabric, learner: Learner, data: Dataset, epoch: int, progress: TrainingProgress
) -> dict[str, Any]:
    """Train for one epoch. Return its row of the log: learning rate, mean of each loss term, and share of the time that
    making batches took."""
    # Seeded in each epoch, so that a resumed run draws the same numbers (for dropout, e.g.) as an uninterrupted one.
    torch.manual_seed(epoch_seed(config, epoch))
    balance = class_balance(config, data)
    steps = steps_an_epoch(config, len(data.train))
    l1 = config.l1_at(epoch, steps)
    batches = training_batches(config, data, epoch, rank=fabric.global_rank, world_size=fabric.world_size)
    history: list[Tensor] = []
    guard = StepGuard(learner) if config.on_nan == "skip" else None
    clock = DataClock(fabric.device)
    learner.model.train()
    for step in range(steps):
        clock.start(step)
        terms: list[Tensor] = []
        if guard:
            guard.remember()
        for part in range(config.accumulate):
            images, labels = clock.waited(batches)
            images = images.to(memory_format=learner.memory_format)
            with fabric.no_backward_sync(learner.wrapped, enabled=part < config.accumulate - 1):
                losses = training_losses(outputs(learner.wrapped(images)), labels, config.loss, balance)
                terms.append(torch.stack(list(losses.values())))
                fabric.backward(terms[-1].sum() / config.accumulate)
                terms[-1] = terms[-1].detach()
        if not (guard and guard.undone(terms)):
            learner.step(config.learning_rate(epoch + step / steps), l1)
            history += terms
        clock.stop()
        if fabric.device.type == "cpu" and (epoch * steps + step) % GAP_STEPS == GAP_STEPS - 1:
            return_gaps()
        progress.step(epoch, step, steps)
    if not history:
        raise RunError(f"epoch {epoch + 1}: a step must have a finite loss and gradient, got none of {steps}")
    values = torch.stack(history)
    means = fabric.all_reduce(values.mean(0), reduce_op="mean")
    assert isinstance(means, Tensor)
    mean_of = dict(zip(losses, means.tolist(), strict=True)) | {"l1": l1 and l1 * gamma_l1(learner.model)}
    check_finite(config, epoch, mean_of, values, learner.model)
    return {
        "epoch": epoch + 1,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "losses": mean_of | {"total": sum(mean_of.values())},
        "skipped_steps": guard.skipped if guard else 0,
        "data_share": clock.share,
    }


def epoch_seed(config: Config, epoch: int) -> int:
    return config.seed * 1_000_003 + epoch


def class_balance(config: Config, data: Dataset) -> Tensor | None:
    """The weights of the classes in the cross entropy; None for equal weights."""
    return datasets.class_weights(data.train, data.num_classes) if config.class_weights else None


def outputs(output: Tensor | Exits) -> Exits:
    """A model's output in training mode as exits. The output of a plain network is the deepest exit."""
    return output if isinstance(output, Exits) else Exits((output,))


class DataClock:
    """Measures the share of the time that making batches takes, in one step of :data:`TIMED`. The device's queue is
    emptied before and after, since kernels that are only queued would look free."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.timing, self.data, self.all = device, False, 0.0, 0.0

    def start(self, step: int) -> None:
        self.timing = step % TIMED == TIMED // 2 or step == 0
        self.began = self._now()

    def waited(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The next batch."""
        asked = self._now()
        batch = next(batches)
        self.data += self._now() - asked
        return batch

    def stop(self) -> None:
        self.all += self._now() - self.began

    def _now(self) -> float:
        if not self.timing:
            return 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @property
    def share(self) -> float:
        return self.data / self.all if self.all else 0.0


def training_batches(
    config: Config, data: Dataset, epoch: int, rank: int = 0, world_size: int = 1, drop_last: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch, augmented and mixed as the configuration says."""
    return datasets.batches(
        data.train,
        config.batch_size,
        num_classes=data.num_classes,
        augment=config.augment,
        cutmix=config.cutmix_probability if config.cutmix else 0.0,
        mixup=config.mixup,
        cutout=config.cutout,
        erasing=config.erasing,
        sampling=config.sampling,
        seed=config.seed,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
    )


def cut(config: Config, learner: Learner, data: Dataset, facts: dict[str, Any]) -> dict[str, Any]:
    """Cut the model. Return size, latency and validation accuracy before and after the cut."""
    example = next(evaluation_batches(data.train, data, 16))[0].to(memory_format=learner.memory_format)
    record: dict[str, Any] = {"epoch": facts["epoch"], "before": _state(config, learner, example, data)}
    ratio = cut_ratio(config, learner.model, example[:1], facts["cuts"], record["before"]["macs"])
    if config.importance == "taylor":
        taylor_gradients(config, learner, data, facts["epoch"])
    learner.prune(example, ratio)
    learner.wrap()
    return record | {"after": _state(config, learner, example, data)}


def _state(config: Config, learner: Learner, example: Tensor, data: Dataset) -> dict[str, float]:
    val = evaluate(learner.evaluated, data.val, data, config)
    return size_of(learner.evaluated, example) | ({"val_accuracy": val[-1]["accuracy"]} if val else {})


def taylor_gradients(config: Config, learner: Learner, data: Dataset, epoch: int) -> None:
    """Add up the gradients of the training loss over a few batches in the model, the same in every process. The batches
    leave no other trace: the running statistics of batch norm are restored."""
    torch.manual_seed(epoch_seed(config, epoch))  # for dropout's draws
    learner.model.train()
    kept = [(buffer, buffer.clone()) for buffer in learner.model.buffers()]
    balance = class_balance(config, data)
    batches = training_batches(config, data, epoch, drop_last=True)
    for (images, labels), _ in zip(batches, range(TAYLOR_BATCHES), strict=False):
        losses = training_losses(outputs(learner.model(images)), labels, config.loss, balance)
        torch.stack(list(losses.values())).sum().backward()
    for buffer, before in kept:
        buffer.copy_(before)


def finish(config: Config, learner: Learner, data: Dataset, facts: dict[str, Any], log: RunLog) -> dict[str, Any]:
    """Test, once, the model that the configuration named beforehand. Return the run's record."""
    model = learner.evaluated
    tested = facts["epoch"]
    if config.test_with == "best":
        learner.fabric.barrier()  # the best checkpoint is written by one process
        best = checkpoint.open_run(config.out, "best", learner.fabric.device)
        model, tested = best.model.to(memory_format=learner.memory_format), best.facts["epoch"]  # type: ignore[call-overload]
    thresholds = calibrated(model, data, config)
    exits, labels = collect(model, data.test, data, config)
    example = next(evaluation_batches(data.test, data, 16))[0].to(memory_format=learner.memory_format)
    rows = log.rows()
    seconds = sum(row["seconds"] for row in rows)
    return {
        "model": config.model,
        "data": config.data,
        "seed": config.seed,
        "epoch": tested,
        "epochs": facts["epoch"],
        "tested": config.test_with,
        "test": [metrics.exit_metrics(logits, labels) for logits in exits],
        "test_images": len(labels),
        "test_looked_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "best": facts["best"],
        "val": rows[-1]["val"] if rows else [],
        "training_loss": rows[-1]["losses"] if rows else {},
        "size": size_of(model, example),
        "plan": channel_plan(model),
        "image": [data.channels, data.image_size],
        "cuts": facts["cuts"],
        "thresholds": thresholds,
        "seconds": seconds,
        "data_share": sum(row["data_share"] * row["seconds"] for row in rows) / seconds if rows else 0.0,
        **over_processes([*rows, process_facts(config, learner.fabric)]),
        "confusion": metrics.confusion(exits[-1], labels),
        "classes": data.classes,
    }


def calibrated(model: nn.Module, data: Dataset, config: Config) -> list[float] | None:
    """The early exit thresholds that keep the deepest exit's accuracy on the validation images. None if there are no
    validation images, or only one exit."""
    if not isinstance(model, ResNetKL) or not len(data.val):
        return None
    exits, labels = collect(model, data.val, data, config)
    costs = early_exit.exit_costs(model.eval(), next(evaluation_batches(data.val, data, 1))[0])
    return early_exit.keeping_accuracy(exits, labels, costs).thresholds
