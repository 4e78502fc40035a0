"""Random calls of the CUDA kernels on the emulated GPU (tests/cases.py, tests/oracle.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, cases, examples
from hypothesis import given
from oracle import Rules, check

import rkl_kernels as rk

from .operators import Operators

MOST = 60_000
"""The most products of a case's depthwise step. They take a few milliseconds here."""


def check_emulated(case: Case) -> None:
    """In 16 bits T-ReLU uses the hardware's tanh. Infinities and NaNs spread as depthwise_conv2d's docstring says."""
    sixteen = case.dtype != torch.float32
    tanh, spread = (2.0**-11, 8) if sixteen else (2.0**-22, 1)
    # The emulated operators compute pointwise products on the CPU.
    flushes = case.operator == "separable" and case.dtype == torch.bfloat16
    rules = Rules(case.dtype, flushes, tanh, spread=spread)
    check(case, rules, "cuda", lambda tensors, grad: case.run(rk, tensors, grad))


def test_public_functions_are_served_by_the_emulated_kernels(operators: Operators) -> None:
    x, w, p = torch.randn(1, 8, 5, 5), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)
    for call in (lambda: rk.trelu(x), lambda: rk.depthwise_conv2d(x, w), lambda: rk.separable_conv2d(x, w, p)):
        before = operators.launches.total()
        call()
        assert operators.launches.total() > before


@pytest.mark.parametrize(("height", "kernel"), [(1, "any_vectors"), (2, "rows_convolution")])
def test_one_output_has_no_stride(operators: Operators, height: int, kernel: str) -> None:
    """csrc/tensor_args.h sets the stride of a single output to 1. The general kernel serves the strides 1 and 2 of such
    a call."""
    x = torch.randn(1, 8, height, 20, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    rk.depthwise_conv2d(x, x.new_ones(8, 1, 3, 3), stride=2, padding=height)
    assert operators.launches == {kernel: 1}


@pytest.mark.parametrize(("kernel", "dilation", "open_channels"), [(3, 1, 1), (5, 1, 8), (3, 2, 8)])
def test_an_infinity_spreads_in_images_that_are_transposed(
    operators: Operators, kernel: int, dilation: int, open_channels: int
) -> None:
    """Contiguous images of 16 bits may be transposed. An infinity then spreads as depthwise_conv2d's docstring says."""
    x = torch.randn(1, 16, 9, 9, dtype=torch.bfloat16)
    x[0, 0, 4, 4] = torch.inf
    y = rk.depthwise_conv2d(x, x.new_ones(16, 1, kernel, kernel), padding=dilation * (kernel // 2), dilation=dilation)
    assert (~y.isfinite()).any(dim=(0, 2, 3)).sum() == open_channels


@pytest.mark.parametrize("outputs", [4, 48])  # the pointwise filter's gradient by images, and over all pixels
def test_a_separable_step_over_planes(operators: Operators, outputs: int) -> None:
    """NCHW images in float32 at stride 2 are not transposed, nor are they in the backward."""
    torch.manual_seed(0)
    shapes = (2, 48, 8, 9), (48, 1, 3, 3), (outputs, 48, 1, 1), (48,), (outputs,)
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    exact = [t.detach().double().requires_grad_() for t in tensors]

    def step(function: Any, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        y = function(*inputs, stride=2, padding=1, inner_activation="trelu", activation="trelu")
        return y, *torch.autograd.grad(y.square().sum(), inputs)

    for got, want in zip(step(rk.separable_conv2d, tensors), step(rk.reference.separable_conv2d, exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    for kernel in ("convolve_planes", "plane_bias_and_activation", "sum_planes", "filter_grad_planes"):
        assert operators.launches[kernel], kernel
    assert ("sum_rows" in operators.launches) == (outputs == 4)


@examples(0.04)
@given(case=cases("trelu", empty=False))
def test_trelu(operators: Operators, case: Case) -> None:
    check_emulated(case)


@examples(0.13)
@given(case=cases("depthwise", MOST, empty=False))
def test_depthwise(operators: Operators, case: Case) -> None:
    check_emulated(case)


@examples(0.08)
@given(case=cases("separable", MOST, empty=False))
def test_separable(operators: Operators, case: Case) -> None:
    check_emulated(case)
