"""The CPU's T-ReLU: tanh to 2 units in the last place. test_cpu_machine.py runs this by lower instruction sets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rkl_kernels import ops


def ulps(got: Tensor, want: Tensor) -> float:
    """The largest distance between ``got`` and the fp64 ``want``, in units of the fp32 spacing at ``want``."""
    exponent = torch.frexp(want.abs().clamp_min(2.0**-126)).exponent
    return ((got.double() - want).abs() / torch.ldexp(torch.ones_like(want), exponent - 24)).max().item()


def sampled_negatives(step: int) -> Tensor:
    """Every ``step``-th float below zero, with denormals and -inf among them."""
    bits = torch.arange(0x00000000, 0x7F800001, step, dtype=torch.int64)
    return (
        torch.cat([bits, torch.tensor([1, 2, 3, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000])])
        .to(torch.int32)
        .view(torch.float32)
        .neg()
    )


def test_floats_of_every_exponent_within_two_ulps() -> None:
    for x in sampled_negatives(101).split(1 << 22):  # 21 million floats: 1 in 101, of every exponent
        assert ulps(ops.rkl.trelu(x), torch.tanh(x.double())) <= 2.0


def test_densely_where_the_two_forms_meet() -> None:
    centre = torch.tensor(0.65).view(torch.int32).item()
    x = torch.arange(centre - 200_000, centre + 200_000, dtype=torch.int32).view(torch.float32).neg()
    assert ulps(ops.rkl.trelu(x), torch.tanh(x.double())) <= 2.0


def test_special_values() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0])
    y = ops.rkl.trelu(x)
    assert torch.equal(y[[0, 2, 3, 5, 6, 7, 8, 9]], torch.tensor([0.0, inf, -1.0, 1e-45, -1e-45, 3.4e38, -1.0, 1.0]))
    assert torch.signbit(y[1])
    assert torch.isnan(y[4])
    assert torch.isnan(ops.rkl.trelu_backward(torch.ones(1), y[4:5])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(dtype: torch.dtype) -> None:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    want = torch.where(x > 0, x, torch.tanh(x.double()).float().to(dtype))
    got = ops.rkl.trelu(x)
    number = ~torch.isnan(x)
    assert torch.isnan(got[~number]).all()
    # The value is off by up to 1.2e-6 of itself. So a value close to a tie may round the other way, by one unit.
    steps = (got[number].view(torch.int16).int() - want[number].view(torch.int16).int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 1e-3


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1023, 1025, 100_003, 5_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backward_and_odd_lengths(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    x, grad = torch.randn(n + 1).to(dtype)[1:], torch.randn(n).to(dtype)  # x starts in the middle of a cache line
    y = ops.rkl.trelu(x)
    want = torch.where(x > 0, x.double(), torch.tanh(x.double()))
    tolerance = {torch.float32: 3e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=0)
    derivative = torch.where(y > 0, 1.0, 1 - y.double() ** 2)
    dx = ops.rkl.trelu_backward(grad, y)
    # The rounding error of 1 - y^2 is relative to 1, however small the difference is.
    torch.testing.assert_close(dx.double(), grad.double() * derivative, rtol=tolerance, atol=tolerance)
    ops.rkl.trelu_(x)
    assert torch.equal(x, y)
