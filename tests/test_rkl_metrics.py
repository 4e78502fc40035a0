"""A model's metrics against counts made by hand; the mode, the precision and the images that they are measured on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_rkl_recipe import TINY
from torch import nn

from rkl.network.build import build_model
from rkl.training import evaluation, metrics
from rkl.training import train as trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_metrics_by_hand() -> None:
    """Of three images of class 0 all are found, of one of class 1 none, and of two of class 2 one."""
    labels, chosen = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 2, 0])
    logits = torch.full((6, 3), -100.0)
    logits[range(6), chosen] = 0.0
    found = metrics.exit_metrics(logits, labels)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["recall"] == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert found["f1"] == pytest.approx((2 * 3 / (5 + 3) + 0 + 2 * 1 / (1 + 2)) / 3)
    assert found["ece"] == pytest.approx(2 / 6)
    assert found["nll"] == pytest.approx(2 * 100 / 6)
    assert metrics.confusion(logits, labels) == [[3, 0, 0], [1, 0, 0], [1, 0, 1]]


def test_the_calibration_error_is_of_fifteen_bins() -> None:
    """Two confidences in neighbouring fifteenths: the lower one is right, the higher one wrong."""
    low, high = 0.72, 0.74
    logits = torch.tensor([[low, 1 - low], [high, 1 - high]]).log()
    found = metrics.exit_metrics(logits, torch.tensor([0, 1]))
    assert found["ece"] == pytest.approx((1 - low + high) / 2, abs=1e-5)


def test_a_model_is_measured_in_eval_mode_and_left_in_its_own() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2))
    (logits,), _ = metrics.collect_exits(model, [(torch.ones(8, 1, 2, 2), torch.zeros(8))])
    assert (logits == logits[0]).all()
    assert model.training


def test_a_model_is_measured_in_the_precision_it_is_trained_in() -> None:
    data, model, kinds = trainer.load_data(TINY), build_model(TINY, 10, 1, 8), []
    model.fc.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    for precision in ("bf16-mixed", "32-true"):
        evaluation.collect(model, data.val, data, replace(TINY, precision=precision))
    assert kinds == [torch.bfloat16, torch.float32]


def test_thresholds_are_of_validation_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No threshold comes from the test images."""
    data, real, seen = trainer.load_data(TINY), trainer.collect, []
    monkeypatch.setattr(trainer, "collect", lambda model, split, *rest: seen.append(split) or real(model, split, *rest))
    assert trainer.calibrated(build_model(TINY, 10, 1, 8), data, TINY)
    assert [split is data.val for split in seen] == [True]
