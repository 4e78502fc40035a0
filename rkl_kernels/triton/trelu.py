"""Elementwise kernels: T-ReLU, and the other activations where a step is not fused."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .._backends import INTERPRETED
from . import activation as act
from .launch import block, is_wide, run

# 1024 elements for 4 warps: each thread has one 16-byte vector of 16-bit elements, or two of float32.
# The interpreter's time grows with the number of programs, so its blocks are large.
BLOCK = 1 << 16 if INTERPRETED else 1024


@triton.jit
def _forward(x, y, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    at = block(tl.program_id(0), BLOCK, WIDE)
    value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(y + at, act.activate(value, ACTIVATION).to(y.dtype.element_ty), mask=at < n)


@triton.jit
def _backward(
    grad, value, dx, n, ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    at = block(tl.program_id(0), BLOCK, WIDE)
    v = tl.load(value + at, mask=at < n, other=0.0).to(tl.float32)
    derivative = act.derivative_from_output(v, ACTIVATION) if FROM_OUTPUT else act.derivative_from_input(v, ACTIVATION)
    gradient = tl.load(grad + at, mask=at < n, other=0.0).to(tl.float32)
    product = act.times_derivative(gradient, derivative, ACTIVATION)
    tl.store(dx + at, product.to(dx.dtype.element_ty), mask=at < n)


def _run(kernel: Any, n: int, *tensors: Tensor, **constants: Any) -> None:
    run(kernel, (triton.cdiv(n, BLOCK),), *tensors, n, **constants, BLOCK=BLOCK, WIDE=is_wide(n), num_warps=4)


def laid_out_like(x: Tensor, layout: Tensor) -> Tensor:
    """``x`` in the dense layout of ``layout``; ``x`` itself if it has it (strides of sizes of 1 do not count)."""
    pairs = zip(x.shape, x.stride(), layout.stride(), strict=True)
    return x if all(a == b for size, a, b in pairs if size > 1) else torch.empty_like(layout).copy_(x)


def activate(x: Tensor, number: int) -> Tensor:
    """The activation of ``x``, by its number in the operators. 0 is no activation and returns ``x`` itself."""
    if not number:
        return x
    y = torch.empty_like(x)  # dense, in the order of x's dimensions, whatever gaps x has
    if x.numel():
        _run(_forward, x.numel(), laid_out_like(x, y), y, ACTIVATION=number)
    return y


def times_derivative(grad: Tensor, value: Tensor, number: int, from_output: bool) -> Tensor:
    """``grad`` times the activation's derivative. ``value`` is the activation's output or its input."""
    if not number:
        return grad
    dx = torch.empty_like(value)
    if value.numel():
        tensors = laid_out_like(grad, dx), laid_out_like(value, dx), dx
        _run(_backward, value.numel(), *tensors, ACTIVATION=number, FROM_OUTPUT=from_output)
    return dx


def trelu(x: Tensor) -> Tensor:
    return activate(x, act.TRELU.value)


def trelu_(x: Tensor) -> None:
    if not x.numel():
        return
    dense = x.contiguous(memory_format=suggest_memory_format(x) if x.dim() == 4 else torch.contiguous_format)
    _run(_forward, x.numel(), dense, dense, ACTIVATION=act.TRELU.value)
    if dense is not x:  # x had gaps: it went through a dense copy
        x.copy_(dense)


def trelu_backward(grad: Tensor, y: Tensor) -> Tensor:
    return times_derivative(grad, y, act.TRELU.value, from_output=True)
