"""The T-ReLU kernels of csrc/cuda/trelu.cu on the emulated GPU."""

from __future__ import annotations

import math

import pytest
import torch

import rkl_kernels as rk

from .conftest import DTYPES, ORDERS, Gpu

# Relative to the value: the rounding to the type (in fp32 the error of tanh), and in 16 bits the hardware's tanh too.
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 2**-8 + 2**-11, torch.float16: 2**-11 + 2**-11}
SMALLEST = {torch.float32: 2**-149, torch.bfloat16: 2**-133, torch.float16: 2**-24}
# Below, at and above a vector of 16 bytes; a tail after whole vectors; more than one block.
SIZES = [1, 3, 8, 9, 4096, 2500]


def run(gpu: Gpu, name: str, *tensors: torch.Tensor) -> None:
    x = tensors[0]
    getattr(gpu.kernels, name)(*(t.data_ptr() for t in tensors), x.numel(), gpu.dtype(x.dtype), 0)


@pytest.mark.sanitized
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_values(gpu: Gpu, order: str, dtype: torch.dtype, n: int, offset: int) -> None:
    gpu.schedule(order)
    x, grad = (gpu.put(torch.randn(n + offset, dtype=dtype) * 3)[offset:] for _ in range(2))
    y, dx = (gpu.empty(n + offset, dtype=dtype)[offset:] for _ in range(2))
    run(gpu, "trelu", x, y)
    torch.testing.assert_close(y.double(), rk.reference.trelu(x.double()), rtol=TOLERANCE[dtype], atol=SMALLEST[dtype])
    run(gpu, "trelu_backward", grad, y, dx)
    derivative = torch.where(y > 0, 1.0, 1 - y.double() ** 2)
    torch.testing.assert_close(dx.double(), grad.double() * derivative, rtol=ROUNDING[dtype], atol=3 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_and_special_values(gpu: Gpu, dtype: torch.dtype) -> None:
    x = gpu.put(torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, -100.0, 1e-3, -1e-3, 60000.0], dtype=dtype))
    expected = rk.reference.trelu(x.float()).to(dtype)
    run(gpu, "trelu", x, x)
    torch.testing.assert_close(x, expected, rtol=TOLERANCE[dtype], atol=0, equal_nan=True)
    grad, dx = gpu.put(torch.ones_like(x)), gpu.empty(x.numel(), dtype=dtype)
    run(gpu, "trelu_backward", grad, x, dx)
    assert dx[0].isnan()
    assert dx[1:6].tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_moved_once(gpu: Gpu, dtype: torch.dtype) -> None:
    x = gpu.put(torch.randn(4096, dtype=dtype))
    y, dx = gpu.empty(4096, dtype=dtype), gpu.empty(4096, dtype=dtype)
    run(gpu, "trelu", x, y)
    assert gpu.moved() == 2 * x.nbytes
    run(gpu, "trelu_backward", x, y, dx)
    assert gpu.moved() == 5 * x.nbytes


def test_more_than_two_to_the_31_elements(gpu: Gpu) -> None:
    # 2^20 blocks walk 2^31 elements in their first turn. Only the first and the last block run here. The elements
    # beyond 2^31 are the first block's second turn, and the tail.
    n = 2**31 + 2**14 + 5
    x, y = (gpu.empty(n, dtype=torch.bfloat16, fill=False) for _ in range(2))
    x[2**31 - 2048 :] = -1
    gpu.kernels.schedule.first_blocks, gpu.kernels.schedule.last_blocks = 1, 1
    run(gpu, "trelu", x, y)
    for written in (y[2**31 - 2048 : 2**31 + 2048], y[-5:]):
        torch.testing.assert_close(written.double(), torch.full_like(written, -1).double().tanh(), rtol=0.01, atol=0)
