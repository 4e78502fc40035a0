"""The pointwise step in one kernel (csrc/cuda/pointwise.cu) on the emulated GPU, against fp64."""

from __future__ import annotations

import pytest
import torch

from rkl_kernels import reference
from rkl_kernels._checks import ACTIVATIONS

from .conftest import ORDERS, Gpu

TYPES = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHORT = [name for name in ACTIVATIONS if name != "gelu"]
# Pixels, channels, outputs. They cover a whole tile and less, fewer channels than a stage and odd numbers of halves of
# one, and outputs of each compiled width and of several.
SHAPES = [(128, 32, 128), (5, 8, 8), (131, 16, 96), (70, 40, 24), (300, 72, 144), (129, 104, 320), (200, 136, 64)]


def multiply(gpu: Gpu, shape: tuple[int, int, int], dtype: torch.dtype, activation: str | None, bias: bool = True):
    torch.manual_seed(0)
    pixels, channels, outputs = shape
    image, filter = (gpu.put(torch.randn(n, channels).to(dtype)) for n in (pixels, outputs))
    biases = gpu.put(torch.randn(outputs).to(dtype)) if bias else None
    out = gpu.empty(pixels, outputs, dtype=dtype)
    code = ACTIVATIONS.index(activation) + 1 if activation else 0
    gpu.kernels.pointwise(image.data_ptr(), filter.data_ptr(), biases.data_ptr() if bias else 0, code, out.data_ptr(),
                          *shape, gpu.dtype(dtype), gpu.kernels.current_device(), 0)  # fmt: skip
    exact = image.double() @ filter.double().T + (biases.double() if bias else 0)
    scale = image.double().abs() @ filter.double().abs().T + 1
    return out.double(), reference.activate(exact, activation), scale


def check(got, want, scale, dtype, activation):
    tanh = 2**-11 if activation == "trelu" else 0
    bound = scale * 2**-20 + want.abs() * (TYPES[dtype] + tanh) + 1e-6
    assert torch.isfinite(got).all()
    assert ((got - want).abs() <= bound).all()


@pytest.mark.sanitized
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products(gpu: Gpu, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    for bias in (False, True):
        check(*multiply(gpu, shape, dtype, None, bias), dtype, None)


@pytest.mark.parametrize("activation", SHORT)
def test_activations(gpu: Gpu, activation: str) -> None:
    check(*multiply(gpu, (70, 40, 96), torch.bfloat16, activation), torch.bfloat16, activation)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("late", [True, False])
def test_any_order_of_warps(gpu: Gpu, order: str, late: bool) -> None:
    gpu.schedule(order, late_copies=late)
    check(*multiply(gpu, (400, 72, 144), torch.bfloat16, "relu"), torch.bfloat16, "relu")


def test_more_tiles_than_blocks(gpu: Gpu) -> None:
    tiles = 2000  # a block's ring of buffers runs on from one tile into the next
    check(*multiply(gpu, (128 * tiles, 8, 8), torch.bfloat16, None), torch.bfloat16, None)
    assert gpu.traffic()["multiply_pixels"].blocks < tiles


def test_each_pixel_is_read_once(gpu: Gpu) -> None:
    pixels, channels, outputs = 512, 64, 128
    multiply(gpu, (pixels, channels, outputs), torch.bfloat16, "relu")
    traffic = gpu.traffic()["multiply_pixels"]
    assert traffic.written == pixels * outputs * 2
    assert traffic.read <= 1.05 * (pixels * channels * 2 + 4 * (outputs * channels * 2 + outputs * 2 * 8))


def test_what_it_serves(gpu: Gpu) -> None:
    kernels, facts = gpu.kernels, gpu.kernels.current_device()
    bf16, f32 = gpu.dtype(torch.bfloat16), gpu.dtype(torch.float32)
    gelu = ACTIVATIONS.index("gelu") + 1
    assert kernels.serves_pointwise(8, 8, 0, bf16, True, facts)
    refused = [(12, 8, 0, bf16, True), (8, 12, 0, bf16, True), (8, 8, gelu, bf16, True), (8, 8, 0, f32, True)]
    for case in (*refused, (8, 8, 0, bf16, False)):
        assert not kernels.serves_pointwise(*case, facts), case
