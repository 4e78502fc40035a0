"""Whole models in the benchmarks: wrong ones are not timed, and what is timed is the work alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_rows import Net, Spoilt

import rkl_kernels as rk
from benchmarks import gpu_models, models
from rkl_kernels.bench.memory import allocated, peak_memory


def test_a_model_is_timed_in_both_directions_converted_and_not() -> None:
    rows = models.measure_model(models.Model("Net", Net, 2, 8), budget=0.02)
    assert [row.direction for row in rows] == ["inference", "training step"]
    for row in rows:
        assert set(row.times) == set(models.VARIANTS)
        assert row.ratio() is not None
    prepared = models.Prepared(models.Model("Net", Net, 2, 8), "ours nhwc")
    assert isinstance(prepared.net[0], rk.DepthwiseConv2d)
    before = prepared.net[3].weight.clone()
    prepared.step()
    assert not torch.equal(prepared.net[3].weight, before)


@pytest.mark.parametrize("module", [models, gpu_models])
@pytest.mark.parametrize("name", ["ours", "eager"])
def test_a_timed_call_does_not_switch_the_model(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take 0.4 ms for a hundred modules, and a fused copy has fewer of them."""
    prepared = (
        models.Prepared(models.Model("Net", Net, 2, 8), f"{name} nchw")
        if module is models
        else gpu_models.Prepared(Net(), name, 2, 8, "cpu")
    )
    for direction in models.DIRECTIONS:
        run = prepared.call(direction)
        served = prepared.served if direction == "inference" else prepared.net
        assert served.training == (direction == "training step")
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "train", lambda *_: pytest.fail("the model is switched in a timed call"))
            run()


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_a_wrong_model_is_not_timed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rk, "fuse_for_inference", lambda net: Spoilt(net, factor))
    Spoilt.calls = 0
    rows = models.measure_model(models.Model("Net", Net, 2, 8), budget=0.02)
    assert Spoilt.calls == 2, "the check of each layout alone"
    for row in rows:
        assert set(row.times) == {"eager nchw", "eager nhwc"}
        assert set(row.rejected) == {"ours nchw", "ours nhwc"}
        assert all(why.startswith("wrong: logits off by ") for why in row.rejected.values())
        assert row.ratio() is None


@pytest.mark.skipif(allocated() is None, reason="this allocator does not tell how much it has given out: not glibc's")
def test_peak_memory_counts_what_backward_keeps() -> None:
    x = torch.randn(2_000_000, requires_grad=True)
    size = x.numel() * 4

    def step(activation) -> None:  # type: ignore[no-untyped-def]
        y = x
        for _ in range(8):
            y = activation(y)
        y.sum().backward()
        x.grad = None

    sine, ours, reference = (peak_memory(lambda f=f: step(f)) / size for f in (torch.sin, rk.trelu, rk.reference.trelu))
    assert 7.5 < sine < 11.5, "seven inputs beside x, and the gradients that meet in backward"
    assert 7.5 < ours < 11.5, "one tensor kept for each T-ReLU"
    assert reference > ours + 1.5, "where(x > 0, x, tanh(x)) also keeps the condition"
    assert peak_memory(lambda: torch.ones(10).sum()) < size / 10
