"""The CPU's depthwise kernels against fp64, over many shapes, layouts, strides and types."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rkl_kernels
from rkl_kernels import ops

CASES = [  # N, C, H, W, (kh, kw), stride, padding, dilation
    (2, 5, 7, 9, (3, 3), 1, 1, 1),
    (1, 16, 13, 13, (3, 3), 2, 1, 1),
    (2, 33, 12, 11, (3, 3), 1, 0, 1),
    (2, 19, 9, 20, (5, 5), 1, 2, 1),
    (1, 24, 15, 14, (5, 5), 2, 2, 1),
    (2, 17, 10, 10, (7, 7), 1, 3, 1),
    (1, 40, 14, 14, (7, 7), 2, 3, 1),
    (1, 7, 23, 21, (13, 13), 1, 6, 1),
    (1, 20, 20, 33, (31, 31), 1, 15, 1),
    (1, 9, 33, 35, (31, 31), 2, 15, 1),
    (2, 18, 17, 15, (3, 3), 1, 6, 6),
    (1, 4, 12, 13, (3, 3), 2, 2, 2),
    (1, 34, 9, 9, (2, 4), (1, 2), (0, 3), (2, 1)),
    (1, 6, 11, 12, (4, 1), (3, 2), (2, 0), (1, 1)),
    (3, 3, 1, 1, (3, 3), 1, 1, 1),
    (2, 1, 8, 70, (3, 3), 1, 1, 1),
    (2, 65, 4, 4, (3, 3), 1, 1, 1),
    (1, 8, 6, 6, (1, 1), 1, 0, 1),
    (1, 8, 6, 6, (3, 3), 1, 5, 1),
    (1, 32, 3, 40, (3, 7), 1, (1, 3), (1, 2)),
    (2, 32, 4, 4, (3, 3), 2, 1, 1),  # rows of two outputs
    (2, 32, 4, 3, (3, 3), 2, 1, 1),
    (2, 17, 5, 64, (3, 3), 1, 1, 1),  # several blocks inside the image
    (1, 24, 6, 57, (5, 5), 1, 2, 1),
    (1, 20, 7, 90, (3, 3), 2, 1, 1),
    (2, 19, 9, 13, (3, 3), 2, 1, 1),  # by HalvingRows: rows in pairs, the last one alone
    (3, 8, 16, 16, (3, 3), 2, 1, 1),  # pairs that fill a vector
    (1, 6, 37, 69, (3, 3), 2, 1, 1),  # rows of whole vectors and a rest
    (2, 3, 1, 64, (3, 3), 2, 1, 1),
    (2, 3, 40, 1, (3, 3), 2, 1, 1),
    (2, 21, 33, 31, (3, 3), 1, 1, 1),  # planes of many vectors, the last one short
    (1, 32, 14, 3, (3, 3), 2, 3, 3),  # phases of one tap and of two, three rows apart
    (1, 20, 23, 9, (3, 3), 2, 4, 4),  # phases of three taps, two rows apart, and of none
    (2, 48, 11, 15, (5, 5), 1, 2, 1),  # two vectors at once and one alone
    (1, 72, 9, 15, (13, 13), 1, 6, 1),  # four vectors, and one that overlaps; filters in pieces
    (1, 40, 20, 19, (13, 9), 2, (6, 4), 1),
    (1, 48, 6, 5, (5, 5), 1, 9, 1),  # outputs that no tap reaches
    (1, 32, 6, 7, (9, 9), 3, 12, 1),
    (2, 8, 9, 12, (3, 1), 1, (1, 0), 1),  # one column: pixels of a row as channels
    (2, 24, 20, 8, (5, 1), (2, 1), (2, 0), (2, 1)),
    (1, 40, 7, 6, (3, 1), 1, (1, 0), 1),
    (2, 32, 9, 13, (1, 3), 1, (0, 1), 1),
    (2, 48, 8, 9, (2, 3), 1, 1, 1),
    (7, 5, 6, 11, (3, 3), 1, 1, 1),  # three images in a vector, and the last one alone
    (7, 3, 9, 9, (5, 5), 2, 2, 1),
    (3, 3, 1, 1, (5, 5), 1, 2, 1),  # planes of one pixel
    (1, 156, 6, 60, (3, 3), 2, 1, 1),  # several vectors at a time, and one that overlaps
    (2, 156, 8, 12, (3, 3), 1, 1, 1),
    (1, 64, 4, 70, (3, 3), 1, 1, 1),  # pixels a multiple of 256 bytes apart: written past the caches in parts of a row
    (2, 128, 5, 40, (3, 3), 1, 0, 1),
    (1, 128, 7, 71, (3, 3), 1, 2, 2),
    (1, 256, 5, 134, (3, 3), 2, 1, 1),
    (1, 256, 9, 160, (3, 3), 1, 1, 1),  # rows larger than the second-level cache: in strips of columns
    (1, 200, 9, 150, (3, 7), 1, (1, 3), 1),
    (1, 256, 7, 290, (3, 3), 2, 1, 1),
    (1, 256, 8, 151, (3, 3), 1, 2, 2),
    (1, 256, 5, 140, (3, 9), 1, (1, 4), 1),
    (1, 512, 3, 200, (3, 3), 1, 200, 200),  # strips without outputs
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}  # shares of the largest magnitude


def pair(value: int | tuple[int, int]) -> list[int]:
    return list(value) if isinstance(value, tuple) else [value, value]


def make(case: tuple, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    n, c, h, w, kernel, *window = case
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w).to(dtype)
    if layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.randn(n, c, h, 2 * w).to(dtype)[..., ::2]
    return x, torch.randn(c, 1, *kernel).to(dtype), torch.randn(c).to(dtype), [pair(v) for v in window]


def close(got: Tensor, want: Tensor, dtype: torch.dtype, terms: Tensor | None = None) -> None:
    """``terms``: the summed values, of random signs. Where they cancel, the error is relative to the sum's size without
    cancellation."""
    assert torch.isfinite(got).all()
    assert got.shape == want.shape
    if want.numel():
        size = want.abs().max() if terms is None else max(want.abs().max(), terms.double().norm() / want.numel() ** 0.5)
        assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * size


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case: tuple, dtype: torch.dtype, layout: str) -> None:
    x, weight, bias, window = make(case, dtype, layout)
    doubles = [t.double().requires_grad_() for t in (x, weight, bias)]
    want = F.conv2d(*doubles, *window, groups=x.shape[1])
    y = ops.rkl.depthwise_conv2d(x, weight, bias, *window)
    close(y, want.detach(), dtype)
    assert y.stride() == ops._fake_depthwise(x.to("meta"), weight.to("meta"), None, *window).stride()

    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(want, doubles, grad.double())
    got = ops.rkl.depthwise_conv2d_backward(grad, x, weight, *window, [True] * 3)
    close(got[0], wanted[0], dtype)
    close(got[1], wanted[1], dtype)
    close(got[2], wanted[2], dtype, terms=grad)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=3)))
def test_only_wanted_gradients(mask: tuple[bool, ...], layout: str) -> None:
    x, weight, _, window = make(CASES[0], torch.float32, layout)
    grad = torch.randn_like(ops.rkl.depthwise_conv2d(x, weight, None, *window))
    every = ops.rkl.depthwise_conv2d_backward(grad, x, weight, *window, [True] * 3)
    some = ops.rkl.depthwise_conv2d_backward(grad, x, weight, *window, list(mask))
    for want, all_, got in zip(mask, every, some, strict=True):
        assert got.numel() == (all_.numel() if want else 0)
        if want:
            torch.testing.assert_close(got, all_)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[10]], ids=str)
def test_gradient_with_other_strides(case: tuple, layout: str) -> None:
    x, weight, _, window = make(case, torch.float32, layout)
    y = ops.rkl.depthwise_conv2d(x, weight, None, *window)
    grad = torch.randn(*y.shape[:3], 2 * y.shape[3])[..., ::2]
    for g in (grad, torch.ones(()).expand_as(y)):
        doubles = [t.double().requires_grad_() for t in (x, weight)]
        want = torch.autograd.grad(F.conv2d(*doubles, None, *window, groups=x.shape[1]), doubles, g.double())
        got = ops.rkl.depthwise_conv2d_backward(g, x, weight, *window, [True, True, False])
        for a, b in zip(got, want, strict=False):
            close(a, b, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("case", [*CASES[::2], (9, 48, 30, 31, (3, 3), 1, 1, 1)], ids=str)
def test_same_bits_for_any_number_of_threads(case: tuple, layout: str, dtype: torch.dtype) -> None:
    x, weight, bias, window = make(case, dtype, layout)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = ops.rkl.depthwise_conv2d(x, weight, bias, *window)
            results.append((y, *ops.rkl.depthwise_conv2d_backward(y, x, weight, *window, [True] * 3)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_channels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="x must have at least one channel"):
        ops.rkl.depthwise_conv2d(torch.randn(2, 0, 8, 8), torch.randn(0, 1, 3, 3), None, [1, 1], [1, 1], [1, 1])


def test_empty_batch() -> None:
    x, weight = torch.randn(0, 4, 8, 8), torch.randn(4, 1, 3, 3)
    y = ops.rkl.depthwise_conv2d(x, weight, None, [1, 1], [1, 1], [1, 1])
    assert y.shape == x.shape
    dx, dw, db = ops.rkl.depthwise_conv2d_backward(y, x, weight, [1, 1], [1, 1], [1, 1], [True] * 3)
    assert dx.shape == x.shape
    assert not dw.any()
    assert not db.any()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_operators_keep_torchs_contract(layout: str) -> None:
    x, weight, bias, window = make((2, 5, 6, 7, (3, 3), 1, 1, 1), torch.float32, layout)
    arguments = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.rkl.depthwise_conv2d.default, (*arguments, *window))
    grad = torch.randn_like(x)
    for mask in ([True] * 3, [True, False, False], [False, True, True]):
        torch.library.opcheck(torch.ops.rkl.depthwise_conv2d_backward.default, (grad, x, weight, *window, mask))


def test_direct_calls_are_guarded() -> None:
    x, window = torch.randn(1, 4, 5, 5), [[1, 1], [0, 0], [1, 1]]
    for weight in (torch.randn(3, 1, 3, 3), torch.randn(4, 2, 3, 3), torch.randn(4, 1, 7, 7)):
        with pytest.raises(RuntimeError, match=r"weight must have shape|must fit into"):
            ops.rkl.depthwise_conv2d(x, weight, None, *window)
    with pytest.raises(RuntimeError, match="grad must have the shape"):
        ops.rkl.depthwise_conv2d_backward(x, x, torch.randn(4, 1, 3, 3), *window, [True] * 3)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 9, 13])
def test_pixels_that_no_output_reads_do_not_count(size: int, layout: str, value: float) -> None:
    """Stride 2 leaves the last row and column over. Their values must reach neither the output nor a gradient."""
    x = torch.randn(2, 24, size + 3, size + 5)
    x[:, :, -1], x[:, :, :, -1] = value, value
    x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
    weight, window = torch.randn(24, 1, size, size), [[2, 2], [0, 0], [1, 1]]
    y = ops.rkl.depthwise_conv2d(x, weight, None, *window)
    assert y.isfinite().all()
    grads = ops.rkl.depthwise_conv2d_backward(torch.randn_like(y), x, weight, *window, [True] * 3)
    assert all(grad.isfinite().all() for grad in grads)


def test_one_tap_has_no_dilation():
    """The dilation of a 1 x 1 filter means nothing, however large it is."""
    x, w = torch.randn(2, 16, 5, 6).contiguous(memory_format=torch.channels_last), torch.randn(16, 1, 1, 1)
    y = rkl_kernels.depthwise_conv2d(x, w, dilation=2**30 - 1)
    torch.testing.assert_close(y, x * w.reshape(1, 16, 1, 1))
