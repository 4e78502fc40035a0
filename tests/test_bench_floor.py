"""The floor of a benchmark's row: no more work than must be done, at no lower rate than the machine reaches."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bench_rows import TINY, row_of

from benchmarks.shapes import select
from rkl_kernels.bench.timing import multiplier


def test_the_floor_counts_no_product_with_the_paddings_zeros() -> None:
    """31 x 31 filters seemed to run at 144% of the floor's speed. A convolution of ones counts the other products."""
    for changes in ({}, {"stride": 2}, {"dilation": 2, "padding": 3}, {"kernel_width": 1}, {"kernel": 9, "padding": 4}):
        case = replace(TINY, **changes)
        image, taps = torch.ones(1, 1, case.height, case.width), torch.ones(1, 1, case.kernel, case.filter_width)
        outputs = F.conv2d(image, taps, stride=case.stride, padding=case.padding, dilation=case.dilation)
        products = int(case.batch * case.channels * outputs.sum())
        assert case.least_operations == 2 * products < case.operations
        assert replace(case, direction="backward").least_operations == 4 * products
        separable = replace(case, operator="separable", out_channels=5)
        pointwise = case.batch * case.channels * 5 * outputs.numel()
        assert separable.least_operations == 2 * (products + pointwise)
    assert replace(TINY, padding=0).least_operations == replace(TINY, padding=0).operations
    (wide,) = select("rep-32-k31")
    assert wide.case("depthwise").operations / wide.case("depthwise").least_operations == pytest.approx(1.74, abs=1e-3)
    row = replace(row_of(ours_nchw=4.0, eager_nchw=4.0), matrix_rate=1.0)
    assert row.floor == TINY.least_operations


def test_the_matrix_rate_in_16_bits_is_that_in_32_where_that_is_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    product, types = torch.mm, set()

    def emulated(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        types.add(a.dtype)
        time.sleep(a.dtype == torch.bfloat16)
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", emulated)
    run, operations = multiplier(torch.bfloat16, "cpu")
    assert types == {torch.bfloat16, torch.float32}
    types.clear()
    run()
    assert torch.bfloat16 not in types
    assert operations == 2 * 768**3
