"""Launching: the one place through which every kernel goes, and what all of them are told about tensors.

``benchmarks/static_triton.py`` stands in for :func:`run` to compile each launch ahead of time instead.
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
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device, whatever the tensors' is
        kernel[grid](*args, **constants)


@triton.jit
def _double(x, y):
    tl.store(y, tl.load(x) + tl.load(x))


@cache
def interpreter_serves_bf16() -> bool:
    """Whether the interpreter in use can add: Triton's own (3.6, 3.7) takes bfloat16 for bit patterns, in silence."""
    x = torch.ones(1, dtype=torch.bfloat16)
    y = torch.zeros_like(x)
    run(_double, (1,), x, y)
    return y.item() == 2.0


def span(*tensors: Tensor) -> int:
    """One more than the furthest element of any of the tensors, counted from its first."""
    return max(1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors)


def is_wide(elements: int) -> bool:
    """Whether offsets need 64 bits; the margin is what the last, masked block may count beyond the end."""
    return elements > 2**31 - 2**20


def alignment(x: Tensor) -> int:
    """Largest power of two, up to 16, that divides the channels and every stride but the channels' own.

    Triton looks for 16 alone; told 8, it loads 728 channels of 16 bits as whole 16-byte vectors too.
    """
    n, c, h, w = x.stride()
    return math.gcd(16, x.shape[1], n, h, w) if c == 1 else 1


@triton.jit
def aligned(strides, C, ALIGNMENT: tl.constexpr, WIDE: tl.constexpr):
    """The same strides and channels, told to the compiler to be multiples of ALIGNMENT, as :func:`alignment` found.

    In 64 bits where offsets need them: each factor may fit into 32 where the product does not, within one image too.
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
    """Element numbers of the ``index``-th block."""
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

    16 splits at once: a thread that adds up to a thousand alone waits for memory at each of them.
    """
    size = 1 << 14 if INTERPRETED else 32
    grid = (triton.cdiv(out.numel(), size),)
    sizes = out.numel(), partial.stride(0), partial.shape[0]
    run(_sum_kernel, grid, partial, out, *sizes, SPLITS=16, BLOCK=size, num_warps=4)
