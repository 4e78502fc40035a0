"""Memory: none is kept from one step to the next, and a tensor is freed with its last reference."""

from __future__ import annotations

import gc
import resource
import weakref

import pytest
import torch
from test_threads import CALLS, step

import rkl_kernels as rk


def resident() -> int:
    """Bytes of this process that are resident in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


STEPS = {
    "trelu": (rk.trelu, [(2, 8, 6, 5)]),
    "depthwise": (lambda x, w, b: rk.depthwise_conv2d(x, w, b, 1, 1), [(2, 8, 6, 5), (8, 1, 3, 3), (8,)]),
    "separable": (
        lambda x, d, p: rk.separable_conv2d(x, d, p, padding=1, activation="trelu"),
        [(2, 8, 6, 5), (8, 1, 3, 3), (4, 8, 1, 1)],
    ),
}


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.fuzz)])
@pytest.mark.parametrize("name", STEPS)
def test_steps_at_constant_memory(name, count):
    function, shapes = STEPS[name]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def steps(count: int) -> None:
        for _ in range(count):
            torch.autograd.grad(function(*leaves).sum(), leaves)

    steps(500)
    before = resident()
    steps(count)
    assert resident() - before < 200 * count + (1 << 18)  # less than one tensor of the smallest size a step


@pytest.mark.parametrize("name", CALLS)
def test_no_cycles_hold_tensors(name):
    """With the garbage collector off, backward frees a call's tensors, and its arguments go with their names."""
    function, shapes = CALLS[name]
    step(name)
    gc.collect()
    gc.disable()
    try:
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        x = leaves[0] * 1
        y = function(x, *leaves[1:])
        y.sum().backward()
        seen = [weakref.ref(t) for t in (x, y, *leaves, *(t.grad for t in leaves))]
        del leaves, x, y
        assert [r for r in seen if r() is not None] == []
    finally:
        gc.enable()
