"""Gradients of gradients of separable convolutions and of a converted model, against PyTorch's two layers."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rkl_kernels as rk
from rkl_kernels import _checks


def assert_close(ours, theirs):
    """Compare each tensor relative to its own size, since some sums are a hundred times as large as others."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def penalty(function, *leaves):
    """The gradients of a gradient penalty, the usual reason for second derivatives."""
    y = function(*leaves)
    grads = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


@pytest.mark.parametrize(("inner", "activation"), [(None, None), ("trelu", "relu6"), ("silu", "trelu"), (None, "gelu")])
@pytest.mark.parametrize("biased", [True, False])
def test_separable(inner, activation, biased):
    shapes = (2, 3, 6, 5), (3, 1, 3, 3), (4, 3, 1, 1), *(((3,), (4,)) if biased else ())
    leaves = [(torch.randn(shape) / 2).requires_grad_() for shape in shapes]
    settings = {"padding": 1, "stride": (1, 2), "inner_activation": inner, "activation": activation}
    with rk.use_backend("cpu"):
        ours = penalty(lambda *t: rk.separable_conv2d(*t, **settings), *leaves)
    theirs = penalty(lambda *t: rk.reference.separable_conv2d(*t, **settings), *leaves)
    assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ["relu6", "silu", "gelu"])
@pytest.mark.parametrize("biased", [True, False])
def test_the_operator_itself(activation, biased):
    """Graphs and torch.vmap call the operator itself. It contains every activation and differentiates it."""
    shapes = (2, 3, 6, 5), (3, 1, 3, 3), (4, 3, 1, 1), *(((3,), (4,)) if biased else ())
    leaves = [(torch.randn(shape) / 2).requires_grad_() for shape in shapes]

    def operator(x, w, p, b=None, c=None):
        code = _checks.activation("activation", activation)
        return torch.ops.rkl.separable_conv2d(x, w, p, b, c, [1, 1], [1, 1], [1, 1], 0, code)

    ours = penalty(operator, *leaves)
    theirs = penalty(lambda *t: rk.reference.separable_conv2d(*t, padding=1, activation=activation), *leaves)
    assert_close(ours, theirs)


def test_third_derivative():
    x, w, p = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(2, 1, 3, 3), torch.randn(2, 2, 1, 1)

    def third(library):
        y = library.separable_conv2d(x, w, p, inner_activation="trelu").pow(4).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.square().sum()
        return g

    assert_close([third(rk)], [third(rk.reference)])


def test_a_converted_model_keeps_it():
    plain = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 4, 1))
    converted = copy.deepcopy(plain)
    assert rk.convert(converted).depthwise == ["0"]
    x = torch.randn(2, 3, 6, 6)
    results = []
    for model in (converted, plain):
        grads = torch.autograd.grad(model(x).pow(2).sum(), list(model.parameters()), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), list(model.parameters())))
    assert_close(*results)


def test_a_second_backward_in_autocast_of_a_forward_outside():
    layer, x = rk.SeparableConv2d(8, 4, 3), torch.randn(2, 8, 9, 9, requires_grad=True)

    def second(cast):
        x.grad = None
        y = layer(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            first.sum().backward()
        return x.grad

    torch.testing.assert_close(second(cast=True), second(cast=False))


def around_nothing(function, *leaves):
    return function(*leaves)


def around_a_checkpoint(function, *leaves):
    return checkpoint(function, *leaves, use_reentrant=False)


@pytest.mark.parametrize("around", [around_nothing, around_a_checkpoint])
def test_under_hooks_on_saved_tensors(around):
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 3, 6, 5), (3, 1, 3, 3), (4, 3, 1, 1))]
    results = []
    for library in (rk, rk.reference):
        with torch.autograd.graph.save_on_cpu():
            call = partial(library.separable_conv2d, inner_activation="silu")
            results.append(penalty(partial(around, call), *leaves))
    assert_close(*results)


def test_tensors_that_depend_on_each_other():
    """The filters are made from the image. Each tensor has its own gradient, and both gradients reach the image."""
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    results = []
    for library in (rk, rk.reference):

        def call(x, library=library):
            filters = x[0, :, None, :3, :3] * 1, x.mean((0, 2, 3)).expand(4, 3)[..., None, None]
            return library.separable_conv2d(x, *filters, inner_activation="trelu")

        results.append(penalty(call, x))
    assert_close(*results)
