"""Random calls of the operators on the CPU. cases.py draws the calls, oracle.py bounds their results."""

from __future__ import annotations

from functools import lru_cache

import torch
from cases import Case, cases, examples
from hypothesis import given
from oracle import Rules, check

import rkl_kernels as rk

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@lru_cache
def is_rounded_by_parts(dtype: torch.dtype) -> bool:
    """Whether the library computes the pointwise filter's gradient. It sums parts and rounds each to the type
    (docs/operators.md)."""
    tensors = (torch.zeros(shape, dtype=dtype) for shape in ((8, 64, 32, 32), (64, 1, 3, 3), (64, 64, 1, 1)))
    return "the library makes the pointwise filter's gradient" in rk.explain("separable_conv2d", *tensors).reason


def rules(case: Case) -> Rules:
    flushes = case.dtype == torch.bfloat16 and BF16
    return Rules(case.dtype, flushes=flushes, parts=is_rounded_by_parts(case.dtype))


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
