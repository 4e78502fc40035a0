"""Depthwise convolution, equation (3)."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _checks, reference
from ._autocast import autocast
from ._backends import is_served, namespace_for
from ._checks import IntPair, Padding
from ._operator import reword
from ._surroundings import is_plain
from .ops import rkl


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: Padding = 0,
    dilation: IntPair = 1,
) -> Tensor:
    """Convolve each channel with a filter of its own (equation 3).

    Equivalent to ``F.conv2d(x, weight, bias, stride, padding, dilation, groups=C)``, forward, backward and double
    backward, with sums in float32. Deterministic on every backend; on a GPU cuDNN, as deterministic as it is, makes
    outputs of four columns and less in 16 bits, channels_last, 3 x 3 at stride 2 without a bias. Finite numbers give
    finite results wherever the exact ones are, and the sums on the way to them. An infinity or NaN of a filter may
    count where it stands over the zeros of the padding or not, and one in a channel's filter gradient may make NaN in
    all of its taps. On a GPU they spread: in 16 bits, channels_last, an infinity or NaN in one channel makes NaN in all
    of its group of eight within the filter's window (rounded up to 3, 5 or 7), and in that group's gradients, as in
    contiguous images where they are transposed, which ``rk.explain`` says (5 x 5 and more, a dilation, the filter's
    gradient); with filters of 9 columns and more, or in float32 with filters rounded up, it may make outputs of its own
    channel NaN beside those that it has a part in.

    Args:
        x: (N, C, H, W) or (C, H, W); contiguous, channels_last or any other strides.
        weight: (C, 1, kh, kw), or (m C, 1, kh, kw) for m filters a channel. More than one filter a channel is served
            by PyTorch's own convolution on every device (backend "reference").
        bias: (C,) or None; (m C,) with m filters a channel.
        stride: pixels between two outputs, an int or (height, width).
        padding: zeros around the image, an int or (height, width), or "same" or "valid".
        dilation: pixels between two taps of the filter, an int or (height, width).

    Returns:
        (N, C, H', W') with H' = (H + 2 * padding - dilation * (kh - 1) - 1) // stride + 1, and W' likewise; (N, m C,
        H', W') with m filters a channel. The memory format is that of ``F.conv2d``.

    Raises:
        TypeError: an argument has a type that is not served.
        ValueError: shapes, devices or the window do not fit together.
        RuntimeError: where ``F.conv2d`` raises it, the errors above are RuntimeErrors too.

    Examples:
        >>> x, weight = torch.randn(2, 8, 32, 32), torch.randn(8, 1, 3, 3)
        >>> y = rk.depthwise_conv2d(x, weight, padding=1)
        >>> y.shape
        torch.Size([2, 8, 32, 32])
        >>> torch.allclose(y, nn.functional.conv2d(x, weight, padding=1, groups=8), atol=1e-5)
        True
    """
    if has_torch_function_variadic(x, weight, bias):
        tensors = x, weight, bias
        return handle_torch_function(depthwise_conv2d, tensors, *tensors, stride, padding, dilation)
    # The common case skips the rules below. They are slow in a network, whose layers evict Python from the caches.
    plain = is_plain(x, weight, bias) and is_served(x, weight)
    if plain and (pairs := _checks.unchecked(stride, padding, dilation)):
        try:
            return rkl.depthwise_conv2d.plain(x, weight, bias, *pairs)
        except RuntimeError as error:
            reword(error, partial(_checks.depthwise, x, weight, bias, stride, padding, dilation))
            raise
    x, weight, bias = autocast(x, weight, bias)
    window = _checks.depthwise(x, weight, bias, stride, padding, dilation)
    operators = namespace_for("depthwise_conv2d", x, window.multiplied)
    padded, settings = window.pad_extra(x), window[:3]
    if operators is None:
        return reference.depthwise_conv2d(padded, weight, bias, *settings)
    if x.dim() == 4:
        return operators.depthwise_conv2d(padded, weight, bias, *settings)
    return operators.depthwise_conv2d(padded[None], weight, bias, *settings)[0]
