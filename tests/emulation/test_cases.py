"""The CUDA kernels under random cases, on the emulated GPU (tests/cases.py, tests/oracle.py)."""

from __future__ import annotations

import torch
from cases import Case, cases, examples
from hypothesis import given
from oracle import Rules, check

import rkl_kernels as rk

from .operators import Operators

MOST = 60_000
"""Products of a case's depthwise step: so many take a few milliseconds here."""


def check_emulated(case: Case) -> None:
    """In 16 bits T-ReLU is the hardware's tanh; infinities and NaNs spread as depthwise_conv2d's docstring says."""
    sixteen = case.dtype != torch.float32
    tanh, spread = (2.0**-11, 8) if sixteen else (2.0**-22, 1)
    # The emulated operators take the CPU for a pointwise product.
    flushes = case.operator == "separable" and case.dtype == torch.bfloat16
    rules = Rules(case.dtype, flushes, tanh, spread=spread)
    check(case, rules, "cuda", lambda tensors, grad: case.run(rk, tensors, grad))


def test_public_functions_are_served_by_the_emulated_kernels(operators: Operators) -> None:
    x, w, p = torch.randn(1, 8, 5, 5), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)
    for call in (lambda: rk.trelu(x), lambda: rk.depthwise_conv2d(x, w), lambda: rk.separable_conv2d(x, w, p)):
        before = operators.launches.total()
        call()
        assert operators.launches.total() > before


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
