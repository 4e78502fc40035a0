"""Random programs on a converted or fused model and on a plain one. ``make fuzz`` runs ten times as many."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import programs
import pytest
import torch
from torch import nn

import rkl_kernels as rk

COUNT = int(os.environ.get("RKL_PROGRAMS", "200"))
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Relative to the largest value, or to 1 where that is larger: gradients before a norm may cancel to zero, and then all
that is left is the rounding of larger values. It leaves room for float32 sums in another order in up to 24 layers."""


def assert_alike(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            largest = float(b.detach().abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE.get(b.dtype, 0) * max(largest, 1), equal_nan=True)


def assert_both(ours: Callable[[], Sequence[Any]], theirs: Callable[[], Sequence[Any]]) -> bool:
    """The same results, or an error from both, as PyTorch may refuse a program. Returns whether it can go on."""
    try:
        wanted = theirs()
    except Exception:  # where PyTorch raises any error, ours must raise one too
        with pytest.raises(Exception):  # noqa: B017, PT011  any error
            ours()
        return False
    assert_alike(ours(), wanted)
    return True


def use(net: programs.Net, seed: int) -> list[Any]:
    """One call in a random mode, perhaps with a backward. Returns the output, the gradients and the buffers."""
    rng = random.Random(seed)
    net.train(rng.random() < 0.5)
    net.flag = rng.random() < 0.5
    net.zero_grad(set_to_none=True)
    x = programs.image(seed, net).requires_grad_(rng.random() < 0.5)
    with torch.set_grad_enabled(rng.random() < 0.7):
        y = net(x)
    if y.requires_grad:
        y.square().mean().backward()
    return [y, x.grad, *(p.grad for p in net.parameters()), *net.buffers()]


@pytest.mark.parametrize("seed", range(COUNT))
def test_converted(seed):
    """The model is altered before and after conversion, used in between, and restored in the end."""
    ours, theirs = programs.build(seed), programs.build(seed)
    rng = random.Random(seed)
    actions = [rng.choice(("use", "use", "alter", "convert", "restore")) for _ in range(5)]
    for number, action in enumerate(["convert", *actions, "use", "restore", "use"]):
        if action == "convert":
            rk.convert(ours)
        elif action == "restore":
            rk.restore(ours)
        elif action == "alter":
            for net in (ours, theirs):
                programs.alter(net, seed + number)
        else:
            at = seed + number
            if not assert_both(lambda: use(ours, at), lambda: use(theirs, at)):  # noqa: B023  called at once
                break
    rk.restore(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    swapped, own = ([isinstance(m, rk.DepthwiseConv2d) for m in net.modules()] for net in (ours, theirs))
    assert swapped == own


def called(net: nn.Module, seed: int) -> list[Any]:
    """Two calls in inference. The first has gradients, and its backward reaches the image."""
    x = programs.image(seed, net).requires_grad_()
    y = net(x)
    grad = torch.autograd.grad(y.square().mean(), x)[0] if y.requires_grad else None
    with torch.no_grad():
        return [y, grad, net(x)]


@pytest.mark.parametrize("seed", range(COUNT))
def test_fused(seed):
    """The model is altered, trained for a step, fused, and called."""
    plain = programs.build(seed)
    programs.alter(plain, seed)
    with suppress(RuntimeError, IndexError, TypeError):  # PyTorch refuses some programs
        use(plain, seed + 1)
    if seed % 3 == 0:
        rk.convert(plain)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    random_state = torch.get_rng_state()
    fused = rk.fuse_for_inference(plain)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)
    plain.eval().requires_grad_(False)
    assert_both(lambda: called(fused, seed), lambda: called(plain, seed))


def test_programs_reach_what_they_are_for():
    """Most programs have something fused, and many something left."""
    reports = [rk.fuse_for_inference(programs.build(seed)).fusion_report for seed in range(60)]
    assert sum(bool(report.fused) for report in reports) > 30
    assert sum(bool(report.left) for report in reports) > 30
