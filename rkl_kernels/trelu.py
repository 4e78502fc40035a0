"""T-ReLU, equation (6)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, reference
from .backends import namespace_for


def trelu(x: Tensor, inplace: bool = False) -> Tensor:
    """T-ReLU: the identity above zero, tanh below, smooth at zero (equation 6).

    Equivalent to ``torch.where(x > 0, x, torch.tanh(x))``, in one kernel, and only the output is kept for backward:
    the gradient is 1 where y > 0 and 1 - y^2 elsewhere. NaN gives NaN, -inf gives -1 with gradient 0. The CUDA kernels
    take the hardware's tanh in 16 bits: off by at most 2^-11 of the value, beside the rounding to the type.

    Args:
        x: any shape and strides; float32, bfloat16, float16 or float64.
        inplace: write the result into ``x`` and return ``x``.

    Returns:
        A tensor of the shape, type and layout of ``x``.

    Raises:
        TypeError: ``x`` is no tensor, or no floating one.
    """
    _checks.floating("x", x)
    operators = namespace_for("trelu", x)
    if operators is None:
        return reference.trelu(x, inplace)
    if not inplace:
        return operators.trelu(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return x.copy_(operators.trelu(x)) if torch.compiler.is_compiling() else _InplaceTReLU.apply(x, operators)
    operators.trelu_(x)
    return x


class _InplaceTReLU(torch.autograd.Function):
    """The in-place form under autograd: the overwritten input is the output, all that backward needs."""

    @staticmethod
    def forward(ctx, x, operators):  # type: ignore[no-untyped-def]
        operators.trelu_(x)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        ctx.operators = operators
        return x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return ctx.operators.trelu_backward(grad, *ctx.saved_tensors), None
