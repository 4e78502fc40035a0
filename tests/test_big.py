"""More than 2^31 elements, and batches of any size. Large images take memory only where they are touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exactness import assert_rounded

import rkl_kernels as rk

NHWC = torch.channels_last


@pytest.mark.parametrize("batch", [1, 2, 63, 1000, 100_000])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
def test_batches(batch, memory_format):
    x = torch.randn(batch, 16, 2, 3).contiguous(memory_format=memory_format).requires_grad_()
    weight, pointwise = torch.randn(16, 1, 3, 3), torch.randn(8, 16, 1, 1)
    with rk.use_backend("cpu"):
        depthwise = rk.depthwise_conv2d(x, weight, padding=1)
        separable = rk.separable_conv2d(x, weight, pointwise, padding=1)
    some = torch.randperm(batch)[:50]
    some[:2] = torch.tensor([0, batch - 1])[: len(some)]
    exact, size = ([t.detach().double() for t in (x[some], weight, pointwise)] for _ in range(2))
    size = [t.abs() for t in size]
    for y, terms in ((depthwise, 9), (separable, 25)):
        grad = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, grad)
        want, magnitude = (gradient(t, y is separable, grad[some].double()) for t in (exact, size))
        scale = gradient(size, y is separable, grad[some].double().abs())[1]
        assert_rounded(y[some].detach(), want[0], magnitude[0], terms, roundings=2)
        assert_rounded(dx[some], want[1], scale, terms, roundings=2)


def gradient(tensors, separable, grad):
    """The output and the image's gradient of a depthwise or a separable convolution."""
    x = tensors[0].requires_grad_()
    y = F.conv2d(x, tensors[1], padding=1, groups=16)
    y = F.conv2d(y, tensors[2]) if separable else y
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def zeros(count: int) -> torch.Tensor:
    """Zeros that take no memory until they are written to. NumPy gets them from the system; PyTorch writes its own."""
    return torch.from_numpy(np.zeros(count, np.int16)).view(torch.bfloat16)


def large(memory_format: torch.memory_format) -> torch.Tensor:
    """An image of more than 2^31 elements: zeros except for the last rows of the last channels."""
    shape = (1, 64, 5900, 5900)
    x = zeros(torch.Size(shape).numel())
    x = x.view(1, 5900, 5900, 64).permute(0, 3, 1, 2) if memory_format == NHWC else x.view(shape)
    x[:, -16:, -40:] = torch.randn(1, 16, 40, 5900).bfloat16()
    return x


@pytest.mark.fuzz
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
def test_one_image_of_more_than_two_to_the_31_elements(memory_format):
    x = large(memory_format)
    assert x.numel() > 2**31
    weight = torch.randn(64, 1, 3, 3).bfloat16().requires_grad_()
    with rk.use_backend("cpu"):
        y = rk.depthwise_conv2d(x, weight, stride=8)
    part = x[:, -16:, -40:]  # rows from 5860 on. At stride 8 the first output in them begins at row 5864
    window = part[:, :, 4:].double(), weight[-16:].detach().double()
    exact, size = (F.conv2d(*t, stride=8, groups=16) for t in (window, [t.abs() for t in window]))
    assert_rounded(y[:, -16:, -exact.shape[2] :].detach(), exact, size, 9)
    assert not y[:, :48].any()
    grad = torch.zeros_like(y)
    grad[:, -16:, -exact.shape[2] :] = torch.randn(exact.shape).bfloat16()
    (dw,) = torch.autograd.grad(y, weight, grad)
    some = window[0], grad[:, -16:, -exact.shape[2] :].double()
    want, scale = (
        torch.nn.grad.conv2d_weight(a, (16, 1, 3, 3), b, stride=8, groups=16)
        for a, b in (some, [t.abs() for t in some])
    )
    assert_rounded(dw[-16:], want, scale, grad[0, 0].numel())
    assert not dw[:48].any()


@pytest.mark.fuzz
def test_trelu_of_more_than_two_to_the_31_elements():
    x = zeros(2**31 + 77)
    x[-100:] = -1
    with rk.use_backend("cpu"):
        rk.trelu(x, inplace=True)
    assert (x[-100:].double() - torch.tensor(-1.0).double().tanh()).abs().max() < 2**-8
    assert not x[:1000].any()
