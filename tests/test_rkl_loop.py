"""The training loop: what each step gets, what an epoch draws at random, and which epoch is the best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_rkl_recipe import TINY, learner_of
from torch import nn

from rkl.config import Config
from rkl.data import class_weights
from rkl.distill import training_losses
from rkl.training import train as trainer

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")


def row_of_an_epoch(config: Config, draws_before: int = 0) -> dict[str, Any]:
    """The log's row of the first epoch, after ``draws_before`` random numbers were drawn."""
    learner = learner_of(config)
    learner.wrap()
    torch.rand(draws_before)
    progress = SimpleNamespace(step=lambda *_: None)
    return trainer.train_epoch(config, learner.fabric, learner, trainer.load_data(config), 0, progress)


def test_the_learning_rate_changes_at_every_step() -> None:
    config = replace(TINY, epochs=1, schedule="cosine")
    steps = trainer.steps_an_epoch(config, len(trainer.load_data(config).train))
    assert row_of_an_epoch(config)["lr"] == pytest.approx(config.learning_rate((steps - 1) / steps))


def test_class_weights_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(trainer, "training_losses", lambda *some: given.append(some[3]) or training_losses(*some))
    config = replace(TINY, data="digits-lt", imbalance=9.0, class_weights=True)
    row_of_an_epoch(config)
    wanted = class_weights(trainer.load_data(config).train, 10)
    assert given
    assert all(balance is not None and torch.equal(balance, wanted) for balance in given)


def test_an_epoch_draws_the_same_whatever_came_before() -> None:
    """Dropout's masks too, so that a resumed run ends like an uninterrupted one."""
    config = replace(TINY, model="vgg", width=8, image_size=16)
    one, other = (row_of_an_epoch(config, draws)["losses"] for draws in (0, 1))
    assert one == other


def test_the_seed_reaches_the_validation_split() -> None:
    one, other = (trainer.load_data(replace(TINY, seed=seed)).val.images for seed in (1, 2))
    assert not torch.equal(one, other)


def test_the_first_of_equal_epochs_is_the_best() -> None:
    """The deepest exit's accuracy decides."""
    facts = {"epoch": 1, "best": None}
    assert trainer.note_best(facts, [{"accuracy": 0.9}, {"accuracy": 0.5}])
    facts["epoch"] = 2
    assert not trainer.note_best(facts, [{"accuracy": 1.0}, {"accuracy": 0.5}])
    assert facts["best"] == {"epoch": 1, "accuracy": 0.5}


@pytest.mark.parametrize("tested", ["last", "best"])
def test_latencies_of_a_run_are_of_one_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tested: str) -> None:
    """Those before and after the cut and at the end stand in one table. Images of one channel have no layout."""
    seen: list[torch.Tensor] = []
    real, pixels = trainer.size_of, np.random.default_rng(0)
    for number in range(60):
        (tmp_path / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.integers(256, size=(8, 8, 3), dtype=np.uint8))
        image.save(tmp_path / "images" / "ab"[number % 2] / f"{number}.png")

    def noting(model: nn.Module, example: torch.Tensor) -> dict[str, float]:
        seen.extend([example, model.stem.conv.weight])
        return real(model, example)

    monkeypatch.setattr(trainer, "size_of", noting)
    data = {"data": f"folder:{tmp_path / 'images'}", "train_size": None, "test_size": None}
    trainer.train(replace(TINY, out=tmp_path / "run", prune_at=(0.5,), test_with=tested, **data))
    assert len(seen) == 6
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in seen)
