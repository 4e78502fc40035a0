"""Fused copies: making one leaves the random state as it was, its report names a chain once, and its layers get free
names. A saved copy computes the same when it is loaded."""

from __future__ import annotations

import copy
import io
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from chains import Flagged, X, assert_same, chain
from torch import nn

import rkl_kernels as rk


class Drawing(nn.Module):
    def __init__(self, draw) -> None:
        super().__init__()
        self.body, self.draw = chain(nn.ReLU()), draw

    def forward(self, x):
        return self.body(x) * self.draw()


def by_numpy():
    return float(np.random.rand())  # noqa: NPY002  the test needs the global generator


@pytest.mark.parametrize("draw", [random.random, by_numpy])
def test_random_numbers_that_a_forward_draws_are_given_back(draw):
    """The forward runs while its model is examined. Its random numbers are given back afterwards."""

    def states():
        of_numpy = np.random.get_state()  # noqa: NPY002
        return random.getstate(), of_numpy[1].tolist(), of_numpy[2]

    before = states()
    report = rk.fuse_for_inference(Drawing(draw).eval()).fusion_report
    assert states() == before
    assert report.fused == [("body.0", "body.1", "body.2", "body.3")]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = chain(nn.ReLU())

    def forward(self, x):
        return self.body(x) + self.body(x + 1)


def test_a_chain_that_is_called_twice_is_reported_once():
    plain = Twice().eval()
    fused = rk.fuse_for_inference(plain)
    assert len(fused.fusion_report.fused) == 1
    assert_same(fused, plain)


class Named(nn.Module):
    """One of its layers has the name that the fused layer would get."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_0_fused = chain(nn.ReLU()), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.a_0_fused(self.a(x))


def test_a_fused_layer_takes_no_others_name():
    plain = Named().eval()
    fused = rk.fuse_for_inference(plain)
    assert len(fused.fusion_report.fused) == 1
    assert_same(fused, plain)


class Adding(nn.Module):
    """Writes in place to tensors that it also holds under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.other = chain(nn.ReLU()), chain(nn.SiLU())

    def forward(self, x):
        y = self.body(x)
        rows = y.mT
        y += self.other(x)
        rows *= 2
        return rows + y.mT


class Placing(Adding):
    def forward(self, x):
        y = self.body(x)
        y[:, 0] = self.other(x)[:, 1]
        y[..., -1] += 1
        return y


class Ordering(Adding):
    def forward(self, x):
        return OrderedDict(image=self.body(x), other=[OrderedDict(image=self.other(x))])


@pytest.mark.parametrize("kind", [Adding, Placing, Ordering])
def test_a_loaded_copy_does_what_was_saved(kind):
    """torch.fx traces the loaded code anew. By itself it would misread in-place writes, and take an OrderedDict for a
    dict."""
    plain = kind().eval()
    fused = rk.fuse_for_inference(plain)
    assert isinstance(fused, torch.fx.GraphModule)
    for came in (fused, saved_and_loaded(fused), saved_and_loaded(copy.deepcopy(saved_and_loaded(fused)))):
        ours, theirs = came(X), plain(X)
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert kind is not Ordering or type(ours["other"][0]) is OrderedDict


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("came_by", [copy.deepcopy, saved_and_loaded])
def test_a_part_that_is_copied_or_saved_takes_nothing_else_along(came_by):
    """What contains it is the part's only for as long as both are together."""
    large = 1 << 20
    plain = nn.ModuleList([nn.Linear(large, 1), Flagged()]).eval()
    fused = rk.fuse_for_inference(plain)
    file = io.BytesIO()
    torch.save(fused[1].body, file)
    assert file.tell() < large
    part = came_by(fused[1].body)
    assert part.above == ()
    assert_same(part, plain[1].body)
    again, flagged = came_by(fused), came_by(fused[1])
    assert set(again[1].body.above) == {again, again[1]}
    assert flagged.body.above == (flagged,)
