"""T-ReLU, equation (6)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import _checks, reference
from ._backends import is_built, namespace_for
from ._operator import reword
from ._surroundings import intercepted, is_plain, watched
from .ops import rkl


def trelu(x: Tensor, inplace: bool = False) -> Tensor:
    """T-ReLU: the identity above zero, tanh below, smooth at zero (equation 6).

    Equivalent to ``torch.where(x > 0, x, torch.tanh(x))``, in one kernel. Only the output is kept for backward: the
    gradient is 1 where y > 0 and 1 - y^2 elsewhere. NaN gives NaN, -inf gives -1 with gradient 0. In 16 bits the CUDA
    kernels use the hardware's tanh, whose error is at most 2^-11 of the value, before the rounding to the type.

    Args:
        x: any shape and strides; float32, bfloat16, float16 or float64.
        inplace: write the result into ``x`` and return ``x``.

    Returns:
        A tensor of the shape, type and layout of ``x``.

    Raises:
        TypeError: ``x`` is no tensor, or its type is not served.

    Examples:
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> y = rk.trelu(x)
        >>> y.tolist() == torch.where(x > 0, x, torch.tanh(x)).tolist()
        True
        >>> y.sum().backward()
        >>> x.grad
        tensor([0.4200, 1.0000, 1.0000])
    """
    if has_torch_function_unary(x):
        return handle_torch_function(trelu, (x,), x, inplace)
    if not inplace and type(x) is Tensor and is_plain(x) and is_built(x):  # the common case skips the rules below
        try:
            return rkl.trelu.plain(x)
        except RuntimeError as error:
            reword(error)
            raise
    _checks.floating("x", x)
    operators = namespace_for("trelu", x)
    if operators is None:
        return reference.trelu(x, inplace)
    if not inplace:
        return operators.trelu(x)
    # A compiler removes the copy where it can. Selective checkpointing keeps what operators return: it would count an
    # operator that returns nothing as done, and not write again. DTensor has a rule for copy_.
    if watched() or intercepted(x) or x.is_neg():
        return x.copy_(operators.trelu(x))
    if x.is_inference() and not torch.is_inference_mode_enabled():  # autograd would not see the write
        raise RuntimeError("x must not be an inference tensor, written outside of inference mode; clone it first")
    operators.trelu_(x)
    return x
