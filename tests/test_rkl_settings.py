"""What each setting of the trainer does: to a step computed by hand, to the learning rate, and to the batches."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_rkl_recipe import TINY, learner_of

from rkl.config import Config
from rkl.training import train as trainer
from rkl.training.learner import Learner

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")

PLAIN = replace(TINY, model="resnet", momentum=0.0, weight_decay=0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.2, "cutmix_probability": 0.5, "augment": "trivial", "erasing": 0.25, "cutout": 2},
        {"nesterov": True, "clip": 0.1, "accumulate": 2, "decay": "all", "ema": 0.9, "warmup": 1.0},
        {"loss": replace(TINY.loss, smoothing=0.1), "class_weights": True, "precision": "bf16-mixed"},
        {"model": "resnet", "val_fraction": 0.0},
    ],
    ids=["augmentation", "optimiser", "loss and bf16", "no validation"],
)
def test_every_knob_trains(tmp_path: Path, changes: dict) -> None:
    folder = trainer.train(replace(TINY, out=tmp_path / "run", **changes))
    record = json.loads((folder / "metrics.json").read_text())
    assert record["training_loss"]["total"] > 0
    assert record["epochs"] == 2
    if changes.get("val_fraction") == 0:
        assert (record["best"], record["val"], record["thresholds"]) == (None, [], None)
        assert record["test_images"] == 40


def test_the_learning_rate_by_thirds() -> None:
    config = Config(epochs=6, lr=0.9)
    found = [config.learning_rate(progress) for progress in (0, 1.9, 2, 3.9, 4, 5.9)]
    assert found == pytest.approx([0.9, 0.9, 0.09, 0.09, 0.009, 0.009])


def test_the_learning_rate_along_half_a_cosine() -> None:
    config = Config(epochs=8, lr=0.8, schedule="cosine")
    found = [config.learning_rate(progress) for progress in (0, 2, 4, 8)]
    assert found == pytest.approx([0.8, 0.4 * (1 + math.sqrt(0.5)), 0.4, 0.0])


def test_warm_up_is_linear_and_beside_the_schedule() -> None:
    """Warm-up may reach into the second third, where the rate that it rises to is a tenth."""
    config = Config(epochs=6, lr=0.9, warmup=3.0)
    found = [config.learning_rate(progress) for progress in (0, 1, 2.5, 3, 4)]
    assert found == pytest.approx([0.0, 0.3, 0.09 * 2.5 / 3, 0.09, 0.009])


def test_batches_are_asked_for_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"augment": "trivial", "mixup": 0.2, "cutout": 3, "erasing": 0.25, "sampling": "balanced", "seed": 7}
    config, seen = replace(TINY, cutmix_probability=0.5, **asked), []
    monkeypatch.setattr(trainer.datasets, "batches", lambda *given, **options: seen.append((given, options)))
    data = trainer.load_data(config)
    trainer.training_batches(config, data, 4, rank=1, world_size=2, drop_last=True)
    trainer.training_batches(replace(config, cutmix=False), data, 4)
    ((split, size), options), (_, without) = seen
    assert (split is data.train, size, without["cutmix"]) == (True, config.batch_size, 0.0)
    shared = {"num_classes": 10, "cutmix": 0.5, "epoch": 4, "rank": 1, "world_size": 2, "drop_last": True}
    assert options == asked | shared


def step(learner: Learner, gradient: float, rate: float) -> None:
    """One step along a gradient of the same value everywhere."""
    for parameter in learner.model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    learner.step(rate, 0.0)


def wrapped(config: Config) -> tuple[Learner, list[torch.Tensor]]:
    """A learner, and the values it starts from."""
    learner = learner_of(config)
    learner.wrap()
    return learner, [parameter.detach().clone() for parameter in learner.model.parameters()]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2.0),
        ({"momentum": 0.5}, 1 + 1.5),  # the gradient, and in the second step half of it again
        ({"momentum": 0.5, "nesterov": True}, 1.5 + 1.75),  # each looks half of its buffer ahead
    ],
)
def test_two_steps_of_momentum(changes: dict, expected: float) -> None:
    learner, before = wrapped(replace(PLAIN, **changes))
    for _ in range(2):
        step(learner, 1.0, 0.25)
    for parameter, start in zip(learner.model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), start - 0.25 * expected)


def test_a_clipped_gradient_has_its_norm() -> None:
    """The norm is over all parameters together. A gradient below the limit stays as it is."""
    for gradient in (2.0, 1e-6):
        learner, before = wrapped(replace(PLAIN, clip=0.5))
        norm = gradient * sum(parameter.numel() for parameter in before) ** 0.5
        step(learner, gradient, 1.0)
        for parameter, start in zip(learner.model.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.detach(), start - gradient * min(1.0, 0.5 / norm))


@pytest.mark.parametrize("decay", ["filters", "all"])
def test_a_step_without_a_gradient_decays_what_decays(decay: str) -> None:
    learner, before = wrapped(replace(PLAIN, weight_decay=0.1, decay=decay))
    step(learner, 0.0, 0.5)
    for parameter, start in zip(learner.model.parameters(), before, strict=True):
        decays = decay == "all" or parameter.ndim > 1  # all filters of this model are dense
        torch.testing.assert_close(parameter.detach(), start * (0.95 if decays else 1.0))


def test_the_moving_average_starts_at_the_first_step_and_follows() -> None:
    """The average is evaluated. It starts as the first step's weights, then moves a fifth of the way to each next."""
    learner, before = wrapped(replace(PLAIN, ema=0.8))
    for _ in range(3):
        step(learner, 1.0, 1.0)
    assert learner.evaluated is not learner.model
    behind = 1 + 0.2 + 0.2 * (2 - 0.2)  # after steps 1, 2 and 3
    for parameter, start in zip(learner.evaluated.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), start - behind)
