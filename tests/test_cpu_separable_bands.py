"""Separable convolutions on the CPU: every code path that shapes select, the edges of bands, layouts and threads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from exactness import assert_rounded
from torch import Tensor

from rkl_kernels import ops, reference

CASES = [  # N, C, C', H, W, k, stride, padding, dilation
    (2, 40, 48, 31, 33, 3, 1, 1, 1),  # in backward, several bands an image, the last one short
    (2, 39, 50, 35, 36, 5, 2, 2, 1),
    (2, 96, 24, 77, 78, 3, 1, 1, 1),  # few output channels: forward in bands; planes where they lie, few images
    (1, 33, 57, 20, 40, 3, 1, 12, 12),  # bands whose padding is higher than they are
    (1, 47, 48, 3, 50, 1, 1, 9, 1),  # bands that lie wholly in the padding
    (1, 32, 64, 40, 33, 7, 1, 0, 1),
    (23, 48, 33, 7, 7, 3, 1, 1, 1),  # several images a band
    (32, 16, 32, 18, 18, 3, 2, 0, 1),  # several images a band, whose last rows no window reads
    (1, 160, 200, 7, 7, 3, 1, 1, 1),  # few pixels
    (3, 64, 272, 5, 5, 3, 1, 1, 1),  # in backward, one task
    (2, 256, 272, 5, 5, 3, 1, 1, 1),  # in backward, two parts of the outputs, the last one short
    (5, 256, 130, 2, 2, 3, 2, 1, 1),
    (35, 128, 124, 12, 12, 3, 1, 1, 1),  # in backward, several bands a task
    (8, 365, 301, 14, 14, 3, 1, 1, 1),  # in backward, two parts of the pixels by two of the channels
    (2, 2100, 20, 6, 6, 3, 1, 1, 1),  # the pointwise step's channels in pieces ...
    (9, 1100, 66, 8, 8, 3, 1, 1, 1),  # ... and in bands
    (1, 72, 300, 4, 5, 3, 1, 1, 1),  # few pixels: by blocks of outputs
    (1, 18, 70, 1, 3, 3, 1, 1, 1),  # fewer than a tile has rows
    (3, 20, 5, 9, 9, 3, 1, 1, 1),  # in backward, fewer outputs than a tile has rows
    (17, 34, 130, 33, 31, 3, 1, 1, 1),  # in backward, sixteen parts of the pixels, by bands
    (1, 18, 40, 11, 300, 3, 1, 1, 1),  # rows longer than a piece of NCHW outputs
    (19, 24, 40, 33, 32, 3, 1, 1, 1),  # planes where they lie: several images a task
]

WHOLE_LINES = [  # NCHW outputs of whole cache lines: test_cpu_machine.py lets them exceed the caches
    (3, 20, 40, 12, 48, 3, 1, 1, 1),  # rows that are no whole blocks
    (9, 33, 33, 8, 16, 5, 1, 2, 1),  # several images a band
    (2, 17, 70, 37, 64, 3, 2, 1, 1),
    (70, 3, 4, 16, 16, 3, 1, 1, 1),  # fewer outputs than a tile has rows
    (4, 1030, 1031, 8, 16, 3, 1, 1, 1),  # channels in pieces
]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(case: tuple[int, ...], dtype: torch.dtype, nhwc: bool) -> tuple[list[Tensor], list[list[int]]]:
    n, c, c_out, h, w, k, *window = case
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w).to(dtype)
    x = x.to(memory_format=torch.channels_last) if nhwc else x
    filters = torch.randn(c, 1, k, k).to(dtype) / k, torch.randn(c_out, c, 1, 1).to(dtype)
    return [x, *filters, torch.randn(c).to(dtype), torch.randn(c_out).to(dtype)], [[v, v] for v in window]


def terms(case: tuple[int, ...]) -> int:
    return case[5] ** 2 + case[1] + 2


# The exact results are made of contiguous tensors, which PyTorch convolves several times as fast in float64, and serve
# both layouts: those of a case and type are tested one after the other.
@lru_cache(maxsize=1)
def exact_outputs(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the same computation on absolute values, and the output with relu and T-ReLU."""
    tensors, window = make(case, dtype, False)
    doubles = [t.double() for t in tensors]
    magnitude = reference.separable_conv2d(*(t.abs() for t in doubles), *window)
    return (
        reference.separable_conv2d(*doubles, *window),
        magnitude,
        reference.separable_conv2d(*doubles, *window, "relu", "trelu"),
    )


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: tuple[int, ...], dtype: torch.dtype, nhwc: bool) -> None:
    tensors, window = make(case, dtype, nhwc)
    exact, magnitude, activated = exact_outputs(case, dtype)
    y = ops.rkl.separable_conv2d(*tensors, *window, 0, 0)
    # The depthwise output is rounded to the type too. In bf16 the product is rounded once more, before the bias.
    assert_rounded(y, exact, magnitude, terms(case), roundings=3 if dtype == torch.bfloat16 else 2)
    finished = ops.rkl.separable_conv2d(*tensors, *window, 1, 3)
    assert_rounded(finished, activated, magnitude, terms(case), roundings=3)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("case", WHOLE_LINES, ids=str)
def test_whole_lines(case: tuple[int, ...], biased: bool) -> None:
    tensors, window = make(case, torch.float32, False)
    biases = tensors[3:] if biased else [None, None]
    y = ops.rkl.separable_conv2d(*tensors[:3], *biases, *window, 1, 0)
    double = [t if t is None else t.double() for t in (*tensors[:3], *biases)]
    exact = reference.separable_conv2d(*double, *window, "relu")
    magnitude = reference.separable_conv2d(*(t if t is None else t.abs() for t in double), *window)
    assert_rounded(y, exact, magnitude, terms(case), roundings=2)


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_change_nothing(case: tuple[int, ...], dtype: torch.dtype, nhwc: bool) -> None:
    tensors, window = make(case, dtype, nhwc)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.rkl.separable_conv2d(*tensors, *window, 0, 3))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def gradient_of(y: Tensor) -> Tensor:
    """Random values, the same for both layouts. ``randn_like`` takes ten times as long for NHWC."""
    return torch.empty_like(y).copy_(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))


def backward(
    grad: Tensor, y: Tensor, tensors: list[Tensor], window: list, inner: int, outer: int
) -> tuple[Tensor, ...]:
    saved = y if outer else None
    return ops.rkl.separable_conv2d_backward(grad, saved, *tensors[:4], *window, inner, outer, [True] * 5)


def exact_gradients(doubles: list[Tensor], window: list, grad: Tensor, *names: str | None) -> tuple[Tensor, ...]:
    leaves = [t.requires_grad_() for t in doubles]
    return torch.autograd.grad(reference.separable_conv2d(*leaves, *window, *names), leaves, grad)


@lru_cache(maxsize=1)
def exact_gradients_and_magnitudes(case: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    tensors, window = make(case, dtype, False)
    grad = gradient_of(ops.rkl.separable_conv2d(*tensors, *window, 0, 0)).double()
    doubles = [t.double() for t in tensors]
    absolute = [t.abs() for t in doubles]
    return [exact_gradients(doubles, window, grad), exact_gradients(absolute, window, grad.abs())]


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: tuple[int, ...], dtype: torch.dtype, nhwc: bool) -> None:
    tensors, window = make(case, dtype, nhwc)
    y = ops.rkl.separable_conv2d(*tensors, *window, 0, 0)
    got = backward(gradient_of(y), y, tensors, window, 0, 0)
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    for g, e, m in zip(got, *exact_gradients_and_magnitudes(case, dtype), strict=True):
        # The depthwise output and its gradient are rounded to the type on the way.
        assert_rounded(g, e, m, pixels + case[2] + terms(case), roundings=2)


@pytest.mark.parametrize(("inner", "activation"), [(3, 3), (4, 1), (0, 2)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_through_activations(case: tuple[int, ...], inner: int, activation: int) -> None:
    tensors, window = make(case, torch.float32, True)
    y = ops.rkl.separable_conv2d(*tensors, *window, inner, activation)
    grad = gradient_of(y)
    got = backward(grad, y, tensors, window, inner, activation)
    names = [None, "relu", "relu6", "trelu", "silu"]
    doubles, grad = [t.double().contiguous() for t in tensors], grad.double().contiguous()
    exact = exact_gradients(doubles, window, grad, names[inner], names[activation])
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=0, atol=1e-5 * float(e.abs().max()))


@pytest.mark.parametrize("inner", [0, 3], ids=["plain", "activated"])
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_change_no_gradient(case: tuple[int, ...], dtype: torch.dtype, nhwc: bool, inner: int) -> None:
    tensors, window = make(case, dtype, nhwc)
    grad, results = None, []
    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        y = ops.rkl.separable_conv2d(*tensors, *window, inner, 3)
        grad = gradient_of(y) if grad is None else grad
        results.append(backward(grad, y, tensors, window, inner, 3))
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))
