"""The operators under random cases on the CPU (cases.py draws them, oracle.py says what must come of them)."""

from __future__ import annotations

import torch
from cases import Case, cases, examples
from hypothesis import given
from oracle import Rules, check

import rkl_kernels as rk

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def rules(case: Case) -> Rules:
    """A pointwise filter's gradient is a sum of parts that the library rounds to bf16 each (README.md)."""
    bf16 = case.dtype == torch.bfloat16
    return Rules(case.dtype, flushes=bf16 and BF16, parts=bf16)


def check_on_cpu(case: Case) -> None:
    def serve(tensors, grad):
        with rk.use_backend("cpu"):
            return case.run(rk, tensors, grad)

    check(case, rules(case), "cpu", serve)


@examples(0.1)
@given(cases("trelu"))
def test_trelu(case):
    check_on_cpu(case)


@examples(0.3)
@given(cases("depthwise"))
def test_depthwise(case):
    check_on_cpu(case)


@examples(0.2)
@given(cases("separable"))
def test_separable(case):
    check_on_cpu(case)
