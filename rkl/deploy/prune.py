"""``rkl prune``: cuts a finished run's model to a target at once and trains it on for a few epochs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..network.deployed import deployed
from ..paths import check_apart
from ..slimming import pruning
from ..training import metrics, report
from ..training.checkpoint import Run, example_image, open_run
from ..training.files import RunError, SettingsError, read_lines, resuming
from ..training.guard import check_cuttable
from ..training.images import data_of
from ..training.run_log import RunLog
from ..training.train import train

LATENCY_BATCH = 16


def cut_to_macs(model: nn.Module, image: Tensor, share: float) -> nn.Module:
    """A copy with at most ``share`` of the model's multiply-accumulates. It is cut no further than necessary.

    Raises:
        ValueError: no cut reaches the target.
    """
    if not 0 < share < 1:
        raise ValueError(f"target_macs must be between 0 and 1, a share of the model's own, got {share}")
    limit = share * metrics.count_macs(model, image)
    return _smallest_cut(model, image, lambda slim: metrics.count_macs(slim, image) <= limit, f"target_macs {share}")


def cut_to_latency(model: nn.Module, image: Tensor, milliseconds: float) -> nn.Module:
    """A copy that takes at most ``milliseconds`` for 16 images when deployed. It is cut no further than necessary.

    Raises:
        ValueError: the model is fast enough already, no cut reaches the target, or the cut that does is no faster than
            the model.
    """
    if not 0 < milliseconds < math.inf:
        raise ValueError(f"target_latency_ms must be above 0 and finite, got {milliseconds}")
    images = image.expand(LATENCY_BATCH, -1, -1, -1).contiguous()

    own = metrics.measure_latency(deployed(model), images)
    if own <= milliseconds:
        raise ValueError(f"target_latency_ms must be below the model's own {own:.2f} ms, got {milliseconds}")

    def fast_enough(slim: nn.Module) -> bool:
        return metrics.measure_latency(deployed(slim), images) <= milliseconds

    slim = _smallest_cut(model, image, fast_enough, f"target_latency_ms {milliseconds}")
    if metrics.count_parameters(slim) == metrics.count_parameters(model):  # the target is within the clock's noise
        raise ValueError(
            f"target_latency_ms must need a cut, got {milliseconds}, which the model meets in some measurements; "
            "lower it"
        )
    before, after = metrics.measure_latencies([deployed(model), deployed(slim)], images)
    if after >= before:
        raise ValueError(
            f"target_latency_ms must need a cut that makes the model faster, got {milliseconds}: "
            f"{before:.2f} ms before, {after:.2f} ms after"
        )
    return slim


def _smallest_cut(model: nn.Module, image: Tensor, fits: Callable[[nn.Module], bool], target: str) -> nn.Module:
    slim = copy.deepcopy(model)
    pruning.prune(slim, image, pruning.smallest_ratio(model, image, fits, target))
    return slim


def prune_run(
    run: Run, out: Path, target_macs: float | None, target_latency_ms: float | None, epochs: int
) -> Path | None:
    """Cut a run's model to one target and train it on in a new run folder.

    The learning rate starts at a tenth of the run's and falls to zero along half a cosine. The rest of the
    recipe is the run's, without warm-up, cuts and L1. The remaining channels keep their batch norm statistics.

    Returns:
        As :func:`rkl.training.train.train`: ``out``, or None in a process that does not write it.

    Raises:
        ValueError: neither or both targets are given, or the target cannot be reached.
    """
    if (target_macs is None) == (target_latency_ms is None):
        raise ValueError(
            f"one of target_macs and target_latency_ms must be given, got {target_macs} and {target_latency_ms}"
        )
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    check_apart(out, run.config.data)
    # The checks of the folder and of the images come before the cut, which may take minutes.
    RunLog(replace(run.config, out=out), resume=False, takes_resume=False)
    data_of(run)
    image = example_image(run)
    check_cuttable(run.model, image, f"run must be of another network than {run.config.model}", run.folder)
    with torch.random.fork_rng():
        if target_macs is not None:
            model = cut_to_macs(run.model, image, target_macs)
        else:
            assert target_latency_ms is not None
            model = cut_to_latency(run.model, image, target_latency_ms)
    config = replace(
        run.config,
        out=out,
        epochs=epochs,
        lr=run.config.lr / 10,
        schedule="cosine",
        warmup=0.0,
        prune_at=(),
        prune_macs=None,
        loss=replace(run.config.loss, l1=0.0),
        weights=None,
    )
    try:
        return train(config, start=model)
    except SettingsError as error:
        raise RunError(f"{error.rule}; {error.elsewhere}") from error


@contextmanager
def naming_the_way_on(out: Path) -> Iterator[None]:
    """Let an interrupt in the block name the command that goes on, once there is a cut run in ``out``: from then on
    `rkl prune` would refuse the folder."""
    try:
        yield
    except KeyboardInterrupt:
        if not (out / "checkpoints" / "last.json").exists():
            raise
        raise KeyboardInterrupt(f"{resuming(out)} goes on with the cut run") from None


def before_and_after(run: Run, out: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that ``rkl prune`` prints: a run before, and the run in ``out`` that was cut from it
    after, each as of its checkpoint's epoch. The values come from the two runs' records, except for the latencies.
    Those are measured here in turns, since the recorded ones are from other times and perhaps from another machine."""
    runs = [run, open_run(out, device=run.device)]
    images = example_image(run).repeat(LATENCY_BATCH, 1, 1, 1)
    latencies = metrics.measure_latencies([deployed(each.model) for each in runs], images)
    rows = []
    for name, each, milliseconds in zip(("before", "after"), runs, latencies, strict=True):
        epoch, record = each.facts["epoch"], report.read_metrics(each.folder)
        record["size"] |= {"latency_ms": milliseconds, "latency_batch": LATENCY_BATCH}
        record["val"] = next((row["val"] for row in read_lines(each.folder / "log.jsonl") if row["epoch"] == epoch), [])
        tested = f"{record['test'][-1]['accuracy']:.2%}"
        if record["epoch"] != epoch:  # the test images are looked at once, with the model that the run named beforehand
            tested += f" (epoch {record['epoch']})"
        rows.append([f"{name}, epoch {epoch}", *report.size_rows(record)[-1][1:], tested])
    return [*report.SIZE_HEADER, "test accuracy"], rows
