"""Arguments at the limits of integers, compared with ``F.conv2d``: an error, never a wrong shape."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import rkl_kernels as rk

X, W, P = torch.randn(2, 4, 8, 8), torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1)
BIG = 2**31
HUGE = [
    {"dilation": BIG // 2 + 1}, {"dilation": BIG + 1}, {"dilation": 2**32 + 1}, {"padding": BIG}, {"padding": 2**32},
    {"stride": 2**32 + 1, "dilation": 2**32},
]  # fmt: skip


@pytest.mark.parametrize("window", HUGE, ids=str)
def test_huge_windows_are_refused(window):
    with pytest.raises((RuntimeError, ValueError)):
        F.conv2d(X, W, groups=4, **window)
    with pytest.raises((RuntimeError, ValueError)):
        rk.depthwise_conv2d(X, W, **window)
    with pytest.raises((RuntimeError, ValueError)):
        rk.separable_conv2d(X, W, P, **window)
    pairs = [[n, n] for n in (window.get("stride", 1), window.get("padding", 0), window.get("dilation", 1))]
    for call in (
        lambda: torch.ops.rkl.depthwise_conv2d(X, W, None, *pairs),
        lambda: torch.ops.rkl.separable_conv2d(X, W, P, None, None, *pairs, 0, 0),
        lambda: torch.ops.rkl.depthwise_conv2d_backward(X, X, W, *pairs, [True] * 3),
    ):
        with pytest.raises(RuntimeError, match="must"):
            call()


def test_large_strides_are_served():
    for stride in (100, BIG - 1):
        ours = rk.depthwise_conv2d(X, W, stride=stride)
        torch.testing.assert_close(ours, F.conv2d(X, W, stride=stride, groups=4))


@contextmanager
def allowed(more: int) -> Iterator[None]:
    """Let the process map at most ``more`` further bytes of addresses, written to or not."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_large_strides_take_no_memory_for_them(layout):
    """A table with an entry for each pixel of a stride in both dimensions would take 14 GB here."""
    x = torch.randn(1, 16, 8, 8).to(memory_format=layout)
    results = []
    for convolve in (rk.depthwise_conv2d, lambda *call, **window: F.conv2d(*call, **window, groups=16)):
        leaves = [t.clone().requires_grad_() for t in (x, W.repeat(4, 1, 1, 1))]
        with allowed(1 << 30):
            y = convolve(*leaves, stride=30000, padding=29998)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_channels():
    x, w, p = X[:, :0], W[:0], torch.randn(6, 0, 1, 1)
    with pytest.raises(RuntimeError):
        F.conv2d(x, w, groups=0)
    for backend in ("cpu", "reference"):
        with rk.use_backend(backend):
            with pytest.raises(ValueError, match="at least one channel"):
                rk.depthwise_conv2d(x, w)
            with pytest.raises(ValueError, match="at least one channel"):
                rk.separable_conv2d(x, w, p)
    pairs = [1, 1], [1, 1], [1, 1]
    with pytest.raises(RuntimeError, match="at least one channel"):
        torch.ops.rkl.separable_conv2d(x, w, p, None, None, *pairs, 0, 0)
    with pytest.raises(RuntimeError, match="at least one channel"):
        torch.ops.rkl.separable_conv2d_backward(x, None, x, w, p, None, *pairs, 0, 0, [True] * 5)


def test_no_output_channels():
    with pytest.raises(RuntimeError):
        F.conv2d(X, P[:0])
    for backend in ("cpu", "reference"):
        with rk.use_backend(backend), pytest.raises(ValueError, match="C_out at least 1, got"):
            rk.separable_conv2d(X, W, P[:0])


@pytest.mark.parametrize("shape", [(2, 4, 0, 5), (2, 4, 5, 0), (4, 0, 0)])
def test_no_pixels(shape):
    """With padding such an image would have outputs. ``F.conv2d`` still refuses it, unless the batch is empty too."""
    with pytest.raises(RuntimeError):
        F.conv2d(torch.zeros(shape), W, padding=3, groups=4)
    for backend in ("auto", "cpu", "reference"):
        with rk.use_backend(backend):
            with pytest.raises(ValueError, match="at least one pixel"):
                rk.depthwise_conv2d(torch.zeros(shape), W, padding=3)
            with pytest.raises(ValueError, match="at least one pixel"):
                rk.separable_conv2d(torch.zeros(shape), W, P, padding=3)
            assert rk.depthwise_conv2d(torch.zeros(0, 4, 0, 5), W, padding=3).shape == (0, 4, 4, 9)
