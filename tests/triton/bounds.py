"""How far a kernel's result may lie from the float64 reference: by rounding errors and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def assert_near(actual: Tensor, exact: Tensor, magnitude: Tensor, terms: int, inner: float = 0.0) -> None:
    """``actual`` is ``exact`` up to one rounding to its own type and float32 sums of ``terms`` products.

    Args:
        magnitude: the same sums over absolute values. Rounding errors are proportional to it.
        inner: the relative rounding error of an operand on the way (the depthwise tile in 16 bits).
    """
    assert actual.shape == exact.shape
    share = inner + (terms + 2) * roundoff(torch.float32)
    bound = roundoff(actual.dtype) * exact.abs() + share * magnitude + torch.finfo(actual.dtype).tiny
    error = (actual.double() - exact).abs()
    assert not error.isnan().any(), "NaN in the result"
    worst = (error / bound).max().item()
    assert worst <= 1, f"error is {worst:.3g} times its bound"


def copies(*tensors: Tensor | None) -> list[Tensor | None]:
    """Float64 twins that require gradients."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def magnitudes(*tensors: Tensor | None) -> list[Tensor | None]:
    """Float64 twins of the absolute values. They require gradients."""
    return [None if t is None else t.detach().double().abs().requires_grad_() for t in tensors]


def image(*shape: int, dtype: torch.dtype, layout: str = "NCHW") -> Tensor:
    """Random numbers in the given layout. "gaps" takes every other row of a larger tensor."""
    n, c, h, w = shape
    if layout == "gaps":
        return torch.randn(n, c, 2 * h, w + 1).to(dtype)[:, :, ::2, 1:]
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last if layout == "NHWC" else torch.contiguous_format)
