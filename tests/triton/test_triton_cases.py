"""Random calls of the Triton kernels in the interpreter (tests/cases.py, tests/oracle.py)."""

from __future__ import annotations

import torch
from cases import Case, cases, examples
from hypothesis import given
from oracle import Rules, check

import rkl_kernels as rk

MOST = 60_000
"""The most products of a case's depthwise step."""


def check_interpreted(case: Case) -> None:
    def serve(tensors, grad):
        with rk.use_backend("triton"):
            return case.run(rk, tensors, grad)

    # PyTorch computes pointwise products on the CPU here.
    bf16 = case.operator == "separable" and case.dtype == torch.bfloat16
    check(case, Rules(case.dtype, flushes=bf16, parts=bf16), "triton", serve)


@examples(0.02)
@given(case=cases("trelu"))
def test_trelu(case: Case) -> None:
    check_interpreted(case)


@examples(0.08)
@given(case=cases("depthwise", MOST))
def test_depthwise(case: Case) -> None:
    check_interpreted(case)


@examples(0.05)
@given(case=cases("separable", MOST))
def test_separable(case: Case) -> None:
    check_interpreted(case)
