"""Whole models in the benchmarks: wrong ones are not timed, and what is timed is the work alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_rows import Net, Spoilt

import rkl_kernels as rk
from benchmarks import compiled, gpu_models, models
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
def test_a_wrong_model_is_not_timed(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rk, "fuse_for_inference", lambda net: Spoilt(net, factor))
    Spoilt.calls = 0
    rows = models.measure_model(models.Model("Net", Net, 2, 8), budget=0.02)
    assert Spoilt.calls == 2, "the check of each layout alone"
    for row in rows:
        assert set(row.times) == {"eager nchw", "eager nhwc"}
        assert set(row.rejected) == {"ours nchw", "ours nhwc"}
        assert all(why.startswith("wrong: logits off by ") for why in row.rejected.values())
        assert row.ratio() is None
    assert capsys.readouterr().out.count(" no ratio, without ours nchw, ours nhwc\n") == 2


def _spoilt_weight(net: torch.nn.Module, factor: float) -> None:
    net[0].weight.register_hook(lambda gradient: factor * gradient)


def _spoilt_output(net: torch.nn.Module, factor: float) -> None:
    net.register_forward_hook(lambda net, _, output: factor * output if net.training else None)


@pytest.mark.parametrize("module", [models, gpu_models])
@pytest.mark.parametrize(
    ("spoil", "factor"),
    [(_spoilt_weight, 0.0), (_spoilt_weight, -1.0), (_spoilt_weight, math.nan), (_spoilt_output, 9.0)],
)
def test_a_model_that_trains_wrongly_is_not_timed_in_training(
    module: Any, spoil: Callable[..., None], factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are right, and its gradients were never looked at."""
    convert = rk.convert
    monkeypatch.setattr(rk, "convert", lambda net: (convert(net), spoil(net, factor)))
    monkeypatch.setattr(gpu_models, "MODELS", (models.Model("Net", Net, 2, 8),))
    inference, training = (
        models.measure_model(models.Model("Net", Net, 2, 8), budget=0.02)
        if module is models
        else gpu_models.measure_model(0, "cpu", compile_too=False, budget=0.02)
    )
    ours = {name for name in inference.times if name.startswith("ours")}
    assert ours
    assert not inference.rejected
    assert set(training.rejected) == ours
    assert set(training.times) == set(inference.times) - ours
    assert all(why.startswith("wrong: loss off by ") for why in training.rejected.values())


class Parted(Net):
    """A network whose gradients of images in channels_last are larger by a share, as kinks may make them."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, apart = super().forward(x), x.is_contiguous(memory_format=torch.channels_last)
        return y + self.share * apart * (y - y.detach())


@pytest.mark.parametrize(
    ("share", "note"),
    [
        (0.01, ""),
        (0.25, "gradients compared to 0.5, as PyTorch's own two layouts differ by 0.25 of a gradient's norm"),
        (0.6, "gradients not compared, as PyTorch's own two layouts differ by 0.6 of a gradient's norm"),
    ],
)
def test_gradients_are_compared_as_closely_as_pytorchs_own_layouts_agree(share: float, note: str) -> None:
    """convmixer_768_32 was refused for what PyTorch does to it."""
    model = models.Model("Net", lambda: Parted(share), 2, 8)
    inference, training = models.measure_model(model, budget=0.02)
    assert (inference.note, training.note) == ("", note)
    assert not training.rejected
    assert set(training.times) == set(models.VARIANTS)
    assert models.from_json(models.to_json(training)) == training


@pytest.mark.parametrize(("share", "factor", "is_timed"), [(0.25, 0.0, False), (0.25, 1.3, True), (0.6, 0.0, True)])
def test_what_trains_wrongly_is_found_as_far_as_can_be_told(
    share: float, factor: float, is_timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = rk.convert
    monkeypatch.setattr(rk, "convert", lambda net: (convert(net), _spoilt_weight(net, factor)))
    _, training = models.measure_model(models.Model("Net", lambda: Parted(share), 2, 8), budget=0.02)
    assert ("ours nchw" in training.times) == is_timed
    assert {"eager nchw", "eager nhwc"} <= set(training.times)


def test_a_loss_that_is_wrong_in_pytorchs_other_layout_is_still_rejected() -> None:
    class Wrong(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            apart = self.training and x.is_contiguous(memory_format=torch.channels_last)
            return super().forward(x) * (9.0 if apart else 1.0)

    _, training = models.measure_model(models.Model("Net", Wrong, 2, 8), budget=0.02)
    assert set(training.rejected) == {"eager nhwc", "ours nhwc"}


def test_a_gradient_counts_however_small_it_is() -> None:
    """Those of vectors count together: a bias before a norm has one of rounding errors alone."""
    loss, large, small = torch.ones(()), torch.ones(4, 4), torch.full((2, 2), 1e-9)
    step = [loss, large, small, torch.ones(4), torch.full((4,), 1e-9)]
    assert models.wrong_step(step, step, 1e-3, 0.1) == ""
    assert models.wrong_step([*step[:4], -step[4]], step, 1e-3, 0.1) == ""
    assert models.wrong_step([*step[:2], -small, *step[3:]], step, 1e-3, 0.1).endswith("a gradient by 2 of its norm")
    zeros = [*step[:2], torch.zeros(2, 2), *step[3:]]
    assert models.wrong_step(zeros, zeros, 1e-3, 0.1) == ""
    assert models.wrong_step(step, zeros, 1e-3, 0.1).endswith("a gradient by inf of its norm")
    assert models.wrong_step([1.01 * loss, *step[1:]], step, 1e-3, 0.1).startswith("wrong: loss off by 0.01, ")


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


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_models_under_torch_compile(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that does nothing, or that makes a wrong model, which is not timed."""
    monkeypatch.setattr(torch, "compile", lambda net: Spoilt(net, factor))
    monkeypatch.setattr(compiled, "PUBLISHED", [models.Model("Net", Net, 2, 8)])
    assert compiled.main(["--out", str(tmp_path), "--budget", "0.02"]) == 0
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    rows = [models.from_json(row) for row in record["rows"]]
    right = compiled.VARIANTS if factor == 1 else ("eager", "ours")
    assert [(row.direction, tuple(row.times)) for row in rows] == [(name, right) for name in models.DIRECTIONS]
    assert all(why.startswith("wrong: ") for row in rows for why in row.rejected.values())
    page = file.with_suffix(".md").read_text()
    assert page == compiled.page(record["machine"], rows, record["failed"])
    assert all(f"- Net, {row.direction}, {variant}: wrong" in page for row in rows for variant in row.rejected)


def test_committed_pages_of_compiled_models() -> None:
    for file in (compiled.RESULTS / "compiled").glob("*.json"):
        record = json.loads(file.read_text())
        rows = [models.from_json(row) for row in record["rows"]]
        assert file.with_suffix(".md").read_text() == compiled.page(record["machine"], rows, record["failed"])
