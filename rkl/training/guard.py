"""Checks that end a run or keep it from starting: unusable data or network, values that are not finite, too little
memory, a lost process, a compiler that is missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from rkl_kernels.errors import told

from ..config import Config
from ..data import Dataset
from ..memory import shortage
from ..network.model import ResNet
from ..slimming import pruning
from .cuts import check_reach
from .evaluation import evaluation_batches
from .files import AGAIN, RunError, SettingsError
from .learner import Learner
from .run_log import RunLog


def check_finite(config: Config, epoch: int, terms: dict[str, float], history: Tensor, model: nn.Module) -> None:
    """Raise SettingsError unless an epoch's loss terms and the weights it ended with are finite.

    Args:
        terms: each term's mean over the epoch and over all processes.
        history: (batches, terms) of this process, in the order of ``terms``, which may have more terms at the end.
    """
    place = first_not_finite(history)
    lost = next((name for name in list(terms)[: history.shape[1]] if not math.isfinite(terms[name])), None)
    # The weights are checked too: no loss has been computed since the last step, which may have spoilt them.
    norms = torch.stack(torch._foreach_norm([*model.parameters()]))
    if place is not None:
        value, term = float(history[place]), list(terms)[place[1]]
        wrong = f", step {place[0] // config.accumulate + 1}: the training loss must be finite, got {value} in {term!r}"
    elif lost is not None:
        wrong = f": the training loss must be finite, got {terms[lost]} in {lost!r} on another device"
    elif not bool(norms.isfinite().all()):
        wrong = ": the weights must be finite after the last step, got nan or inf"
    else:
        return
    lower, less = f"lower lr ({config.lr})", "cut less"
    if config.on_nan != "skip":
        lower += " or set on_nan to skip, which leaves such steps out"
        less += ", or set on_nan to skip in the config.yaml of the run that is cut, which leaves such steps out"
    raise SettingsError(f"epoch {epoch + 1}{wrong}", lower, less)


def first_not_finite(history: Tensor) -> tuple[int, int] | None:
    """Row and column of the first value that is nan or infinite; None if there is none."""
    places = (~history.isfinite()).nonzero()
    return None if not len(places) else (int(places[0, 0]), int(places[0, 1]))


class StepGuard:
    """Skips a step so that it changes nothing: weights, momentum, average and batch norm statistics stay."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.skipped = learner, 0
        self.buffers = list(learner.model.buffers())
        self.kept = [buffer.clone() for buffer in self.buffers]

    def remember(self) -> None:
        """Save the buffers, which the forward passes of a step change."""
        for kept, buffer in zip(self.kept, self.buffers, strict=True):
            kept.copy_(buffer)

    def undone(self, losses: Sequence[Tensor]) -> bool:
        """Undo the step and return True if losses or gradients of any process are not finite."""
        learner = self.learner
        watched = list(losses)
        if not learner.scaler:  # the scaler handles overflowing gradients itself: it scales less
            gradients = [parameter.grad for parameter in learner.model.parameters() if parameter.grad is not None]
            watched.append(torch.stack(torch._foreach_norm(gradients)))
        wrong = learner.fabric.all_reduce(1.0 - torch.cat(watched).isfinite().all().float(), reduce_op="sum")
        assert isinstance(wrong, Tensor)
        if not bool(wrong):
            return False
        for kept, buffer in zip(self.kept, self.buffers, strict=True):
            buffer.copy_(kept)
        learner.stepper.zero_grad()
        self.skipped += 1
        return True


def check_splits(config: Config, data: Dataset) -> None:
    """Check that every process gets an image of each split that is evaluated."""
    for name, split in (("val", data.val), ("test", data.test)):
        if 0 < len(split) < config.devices:
            raise ValueError(f"devices must be at most the {len(split)} {name} images, got {config.devices}")


def check_cutout(config: Config, data: Dataset) -> None:
    """Refuse a square that is larger than the images: of many it would leave nothing."""
    if config.cutout > data.image_size:
        raise ValueError(
            f"cutout must be at most the images' side of {data.image_size} pixels, got {config.cutout}; lower it"
        )


def check_cuttable(model: nn.Module, image: Tensor, rule: str, got: object) -> None:
    """Refuse a network that torch_pruning cannot follow, before training rather than at the first cut. ``rule`` names
    the network, and what must be in place of ``got``."""
    try:
        pruning.channel_groups(model, image)
    except Exception as error:  # torch_pruning may raise anything
        raise ValueError(f"{rule}, whose channels torch_pruning cannot follow, got {got} ({told(error)})") from error


def check_cuts(config: Config, model: nn.Module, data: Dataset) -> None:
    """Refuse, before the first epoch, cuts that the network cannot have or that do not reach their target."""
    if not config.cut_epochs:
        return
    image = next(evaluation_batches(data.train, data, 1))[0]
    if not isinstance(model, ResNet):
        check_cuttable(model, image, f"prune_at must be empty for {config.model}", config.prune_at)
    check_reach(config, model, image)


@contextmanager
def in_one_line(config: Config, fabric: Fabric, log: RunLog | None = None) -> Iterator[None]:
    """Turn too little memory, lost processes and what torch.compile cannot do into a RunError. What is written stays,
    so that a run can go on. ``log`` is the log of the run while it trains; it is None while data and model are made."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        remedy = log.remedy if log else AGAIN
        if short := shortage(error):
            what, less = "the model and the data", f"width ({config.width}) or image_size"
            if log:
                what, less = "a step", f"batch_size ({config.batch_size}) and a larger accumulate ({config.accumulate})"
            again = f"free some and {remedy}"
            raise SettingsError(
                f"{config.out}: {what} must fit in memory, got: {short}",
                f"{again}, or train anew with a smaller {less}",
                again,
            ) from error
        text = " ".join(str(error).split())
        if config.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise SettingsError(
                f"{config.out}: compile must go with a network and a C++ compiler that torch.compile can use, got: "
                f"{text[:120]}",
                "set compile to false",
                "set compile to false in the config.yaml of the run that is cut",
            ) from error
        if fabric.world_size > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in text):
            raise RunError(
                f"{config.out}: all {fabric.world_size} processes must live until the end, got one that is lost "
                f"({text[:120]}); {remedy}"
            ) from error
        raise
