"""The operators under ``torch.vmap``: the mapped dimension becomes part of the batch or of the channels, and one call
of the same operator serves all of it.

A rule takes ``(info, in_dims, *arguments)`` and returns ``(output, out_dims)``: see ``torch.library.register_vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from . import _checks, reference
from .decompositions import separable_conv2d_backward

Rule = Callable[..., tuple[Any, Any]]
Dims = Sequence[Any]
"""For each argument, its mapped dimension, or None."""


def rules(ops: Any) -> dict[str, Rule]:
    """The rule of each operator, by name."""

    def trelu(info: Any, in_dims: Dims, x: Tensor) -> tuple[Any, Any]:
        return ops.trelu(x), in_dims[0]

    def trelu_(info: Any, in_dims: Dims, x: Tensor) -> tuple[Any, Any]:
        x.copy_(ops.trelu(x))
        return None, None

    def trelu_backward(info: Any, in_dims: Dims, *tensors: Tensor) -> tuple[Any, Any]:
        grad, y = (_front(t, d, info.batch_size) for t, d in zip(tensors, in_dims, strict=True))
        return ops.trelu_backward(grad, y), 0

    def depthwise(info: Any, in_dims: Dims, x: Tensor, weight: Tensor, bias: Any, *window: Any) -> tuple[Any, Any]:
        if in_dims[1] is None and in_dims[2] is None:
            images = x.movedim(in_dims[0], 0)
            return ops.depthwise_conv2d(images.flatten(0, 1), weight, bias, *window).unflatten(0, images.shape[:2]), 0
        size = info.batch_size
        y = ops.depthwise_conv2d(
            _into_channels(x, in_dims[0], size, 1),
            _into_channels(weight, in_dims[1], size, 0),
            _into_channels(bias, in_dims[2], size, 0),
            *window,
        )
        return y.unflatten(1, (size, -1)), 1

    def depthwise_backward(
        info: Any, in_dims: Dims, grad: Tensor, x: Tensor, weight: Tensor, *settings: Any
    ) -> tuple[Any, Any]:
        size, mask = info.batch_size, settings[-1]
        of_x, of_weight, of_bias = ops.depthwise_conv2d_backward(
            _into_channels(grad, in_dims[0], size, 1),
            _into_channels(x, in_dims[1], size, 1),
            _into_channels(weight, in_dims[2], size, 0),
            *settings,
        )
        grads = ((of_x, 1), (of_weight, 0), (of_bias, 0))
        apart = tuple(g.unflatten(d, (size, -1)) if m else g for m, (g, d) in zip(mask, grads, strict=True))
        return apart, tuple(d if m else None for m, (_, d) in zip(mask, grads, strict=True))

    def separable(info: Any, in_dims: Dims, x: Tensor, *others: Any) -> tuple[Any, Any]:
        weights, settings = others[:4], others[4:]
        if all(d is None for d in in_dims[1:5]):
            images = x.movedim(in_dims[0], 0)
            y = ops.separable_conv2d(images.flatten(0, 1), *weights, *settings)
            return y.unflatten(0, images.shape[:2]), 0
        # A pointwise filter for each mapped element is a grouped convolution, which PyTorch serves.
        size, (*window, inner, outer) = info.batch_size, settings
        places = zip((x, *weights), in_dims, (1, 0, 0, 0, 0), strict=False)
        x, depthwise, pointwise, depthwise_bias, bias = (_into_channels(t, d, size, at) for t, d, at in places)
        depthwise_out = ops.depthwise_conv2d(x, depthwise, depthwise_bias, *window)
        inner, outer = _checks.activation_name(inner), _checks.activation_name(outer)
        y = F.conv2d(reference.activate(depthwise_out, inner), pointwise, bias, groups=size)
        return reference.activate(y, outer).unflatten(1, (size, -1)), 1

    def separable_backward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
        size, mask, tensors, settings = info.batch_size, arguments[-1], arguments[:6], arguments[6:]
        places = zip(tensors, in_dims, (1, 1, 1, 0, 0, 0), strict=False)
        folded: tuple[Any, ...] = tuple(_into_channels(t, d, size, at) for t, d, at in places)
        dims, backward = (1, 0, 0, 0, 0), cast(Any, separable_conv2d_backward)
        grads = zip(mask, backward(*folded, *settings, groups=size), dims, strict=True)
        apart = tuple(g.unflatten(d, (size, -1)) if m else g for m, g, d in grads)
        return apart, tuple(d if m else None for m, d in zip(mask, dims, strict=True))

    return {
        "trelu": trelu,
        "trelu_": trelu_,
        "trelu_backward": trelu_backward,
        "depthwise_conv2d": depthwise,
        "depthwise_conv2d_backward": depthwise_backward,
        "separable_conv2d": separable,
        "separable_conv2d_backward": separable_backward,
    }


def _front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """``x`` with its mapped dimension first. Without a mapped dimension ``x`` is expanded to ``size`` copies."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _into_channels(x: Any, dim: int | None, size: int, channels: int) -> Any:
    """``x`` with the mapped dimension as the outer part of dimension ``channels``. A depthwise convolution allows that,
    since each channel has its own filter. None stays None."""
    return None if x is None else _front(x, dim, size).movedim(0, channels).flatten(channels, channels + 1)
