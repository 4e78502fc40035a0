"""How kernels are launched: all of them go through :func:`run`. Also what they are told about tensors.

``benchmarks/static_triton.py`` replaces :func:`run` to compile each launch ahead of time instead.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backends import INTERPRETED


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch ``kernel`` on the device of its first argument."""
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device, not the tensors'
        kernel[grid](*args, **constants)


@triton.jit
def _double(x, y):
    tl.store(y, tl.load(x) + tl.load(x))


@cache
def interpreter_serves_bf16() -> bool:
    """Whether the interpreter can add bfloat16. Triton's own (3.6, 3.7) silently takes it for bit patterns."""
    x = torch.ones(1, dtype=torch.bfloat16)
    y = torch.zeros_like(x)
    run(_double, (1,), x, y)
    return y.item() == 2.0


def span(*tensors: Tensor) -> int:
    """The largest number of elements that any of the tensors spans, from its first element to its last."""
    return max(1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors)


def is_wide(elements: int) -> bool:
    """Whether offsets need 64 bits. The margin is for the last, masked block, whose offsets exceed the end."""
    return elements > 2**31 - 2**20


def alignment(x: Tensor) -> int:
    """The largest power of two, up to 16, that divides the channels and every stride but that of the channels.

    Triton by itself looks for 16 alone. Told of 8, it also loads 728 channels of 16 bits as 16-byte vectors.
    """
    n, c, h, w = x.stride()
    return math.gcd(16, x.shape[1], n, h, w) if c == 1 else 1


@triton.jit
def aligned(strides, C, ALIGNMENT: tl.constexpr, WIDE: tl.constexpr):
    """The same strides and channels, in a form that shows the compiler that they are multiples of ALIGNMENT.

    Where WIDE they have 64 bits: each factor may fit into 32 bits where the product does not, even within one image.
    """
    c = strides[1]
    if WIDE:
        strides = (
            tl.cast(strides[0], tl.int64), 0, tl.cast(strides[2], tl.int64), tl.cast(strides[3], tl.int64)
        )  # fmt: skip
        c, C = tl.cast(c, tl.int64), tl.cast(C, tl.int64)
    n = strides[0] // ALIGNMENT * ALIGNMENT
    h = strides[2] // ALIGNMENT * ALIGNMENT
    w = strides[3] // ALIGNMENT * ALIGNMENT
    return (n, c, h, w), C // ALIGNMENT * ALIGNMENT


@triton.jit
def block(index, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """The element numbers of block ``index``."""
    if WIDE:
        index = index.to(tl.int64)
    return index * SIZE + tl.arange(0, SIZE)


@triton.jit
def _sum_kernel(partial, out, length, row, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = block(tl.program_id(0), BLOCK, False)
    total = tl.zeros((SPLITS, BLOCK), tl.float32)
    for step in range(tl.cdiv(splits, SPLITS)):
        split = step * SPLITS + tl.arange(0, SPLITS)
        mask = (split < splits)[:, None] & (at < length)[None, :]
        total += tl.load(partial + split[:, None] * row + at[None, :], mask=mask, other=0.0)
    tl.store(out + at, tl.sum(total, 0).to(out.dtype.element_ty), mask=at < length)


def sum_splits(partial: Tensor, out: Tensor) -> None:
    """``out`` (dense) = ``partial`` (splits, out.numel()) summed over its first dimension, always in the same order.

    It adds 16 splits at once: a thread that adds up to a thousand splits alone would wait for memory at each of them.
    """
    size = 1 << 14 if INTERPRETED else 32
    grid = (triton.cdiv(out.numel(), size),)
    sizes = out.numel(), partial.stride(0), partial.shape[0]
    run(_sum_kernel, grid, partial, out, *sizes, SPLITS=16, BLOCK=size, num_warps=4)
