"""Transposing images between NCHW and NHWC (csrc/cuda/transpose.cu) on the emulated GPU."""

from __future__ import annotations

import pytest
import torch

from .conftest import DTYPES, Gpu


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 70, 5, 7), (2, 2, 9, 9), (5, 130, 1, 3), (1, 64, 8, 8)], ids=str)
def test_there_and_back(gpu: Gpu, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, c, h, w = shape
    x = gpu.put(torch.randn(shape).to(dtype))
    sizes = n, c, h * w, gpu.dtype(dtype)
    assert gpu.kernels.can_transpose(*sizes, x.data_ptr())
    there, back = gpu.empty(n, h, w, c, dtype=dtype), gpu.empty(*shape, dtype=dtype)
    gpu.kernels.transpose(x.data_ptr(), there.data_ptr(), True, *sizes, 0)
    assert torch.equal(there, x.permute(0, 2, 3, 1))
    gpu.kernels.transpose(there.data_ptr(), back.data_ptr(), False, *sizes, 0)
    assert torch.equal(back, x)


def test_what_is_left_to_pytorch(gpu: Gpu) -> None:
    """The kernel moves words of 4 aligned bytes, which hold two channels of 16 bits. It counts pixels in 31 bits, and a
    grid has a row for each 32 words of channels."""
    half, single = gpu.dtype(torch.bfloat16), gpu.dtype(torch.float32)
    assert not gpu.kernels.can_transpose(2, 3, 5, half, 0)
    assert gpu.kernels.can_transpose(2, 3, 5, single, 0)
    assert not gpu.kernels.can_transpose(2, 4, 5, half, 2)
    assert not gpu.kernels.can_transpose(1 << 20, 4, 1 << 12, half, 0)
    assert gpu.kernels.can_transpose(1, 65535 * 64, 4, half, 0)
    assert not gpu.kernels.can_transpose(1, 65536 * 64, 4, half, 0)
    assert not gpu.kernels.can_transpose(1, 65535 * 32 + 1, 4, single, 0)
