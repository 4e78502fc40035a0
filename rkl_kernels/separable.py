"""Depthwise-separable convolution, equation (5)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, reference
from ._autocast import autocast
from ._backends import is_served, namespace_for
from ._checks import Activation, IntPair, Padding
from ._operator import reword
from ._surroundings import is_plain, recorded
from .gradients import INVERTIBLE
from .ops import rkl


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
    inner_activation: Activation | None = None,
    activation: Activation | None = None,
) -> Tensor:
    """Depthwise, then pointwise convolution, each with an optional bias and activation (equation 5).

    Equivalent to ``act(F.conv2d(inner_act(F.conv2d(x, depthwise_weight, depthwise_bias, stride, padding, dilation,
    groups=C)), pointwise_weight, pointwise_bias))``. The depthwise output is not kept: backward computes it again.

    On a GPU infinities and NaNs spread between channels as in ``depthwise_conv2d``.

    Args:
        x: (N, C, H, W) or (C, H, W); contiguous, channels_last or any other strides.
        depthwise_weight: (C, 1, kh, kw).
        pointwise_weight: (C', C, 1, 1).
        depthwise_bias: (C,) or None.
        pointwise_bias: (C',) or None.
        stride: pixels between two outputs of the depthwise step, an int or (height, width).
        padding: zeros around the image in the depthwise step, an int or (height, width), or "same" or "valid".
        dilation: pixels between two taps of the depthwise filter, an int or (height, width).
        inner_activation: after the depthwise step: "relu", "relu6", "trelu", "silu", "gelu" (erf form) or None.
        activation: after the pointwise step: one of the same names, or None.

    Returns:
        (N, C', H', W') with H' and W' as in ``depthwise_conv2d``. The memory format is that of ``F.conv2d`` in the
        depthwise step.

    Raises:
        TypeError: an argument has a type that is not served.
        ValueError: shapes, devices, the window or an activation's name do not fit.
        RuntimeError: where ``F.conv2d`` raises it, the errors above are RuntimeErrors too.

    Examples:
        >>> x, depthwise, pointwise = torch.randn(2, 8, 32, 32), torch.randn(8, 1, 3, 3), torch.randn(16, 8, 1, 1)
        >>> y = rk.separable_conv2d(x, depthwise, pointwise, stride=2, padding=1, inner_activation="relu6")
        >>> y.shape
        torch.Size([2, 16, 16, 16])
        >>> middle = nn.functional.conv2d(x, depthwise, stride=2, padding=1, groups=8).clamp(0, 6)
        >>> torch.allclose(y, nn.functional.conv2d(middle, pointwise), atol=1e-4)
        True
    """
    tensors = x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias
    if has_torch_function_variadic(*tensors):
        rest = stride, padding, dilation, inner_activation, activation
        return handle_torch_function(separable_conv2d, tensors, *tensors, *rest)
    inner = _checks.activation("inner_activation", inner_activation)
    outer = _checks.activation("activation", activation)
    # Backward needs the pre-activation of silu and gelu. Where a gradient is wanted, the activation is applied outside
    # the operator, so that autograd keeps its input. Else backward computes it again: under torch.jit.trace, whose
    # graph must be the same in every grad mode, and where this line cannot know that a gradient will be wanted.
    outside = activation not in (None, *INVERTIBLE) and not recorded() and _wants_gradient(tensors)
    fused = 0 if outside else outer
    # The common case skips the rules below, as in depthwise_conv2d.
    plain = is_plain(*tensors) and is_served(x, depthwise_weight)
    if plain and (pairs := _checks.unchecked(stride, padding, dilation)):
        try:
            y = rkl.separable_conv2d.plain(*tensors, *pairs, inner, fused)
        except RuntimeError as error:
            reword(error, partial(_checks.separable, *tensors, stride, padding, dilation))
            raise
        return reference.activate(y, activation) if outside else y
    x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias = autocast(*tensors)
    weights = depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias
    window = _checks.separable(x, *weights, stride, padding, dilation)
    operators = namespace_for("separable_conv2d", x)
    padded, settings = window.pad_extra(x), window[:3]
    if operators is None:
        return reference.separable_conv2d(padded, *weights, *settings, inner_activation, activation)
    batched = padded if x.dim() == 4 else padded[None]
    y = operators.separable_conv2d(batched, *weights, *settings, inner, fused)
    y = reference.activate(y, activation) if outside else y
    return y if x.dim() == 4 else y[0]


def _wants_gradient(tensors: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
