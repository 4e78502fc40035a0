"""Which backend and kernel serve a call, and by what count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import _checks, ops
from .backends import choose


@dataclass(frozen=True)
class Explanation:
    """How a call would be served, and the work that cannot be avoided.

    Attributes:
        operator: the public function's name.
        backend: the backend that serves the call.
        bytes: each input read once, each output written once.
        operations: floating-point operations, a multiply-add counted as two.
    """

    operator: str
    backend: str
    bytes: int
    operations: int

    def __str__(self) -> str:
        intensity = self.operations / max(self.bytes, 1)
        return (
            f"{self.operator}: backend {self.backend}, {self.bytes / 1e6:.3g} MB to move, "
            f"{self.operations / 1e6:.3g} MFLOP, {intensity:.2g} FLOP a byte"
        )


def explain(operator: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would serve ``rkl_kernels.<operator>(*args, **kwargs)`` and what the call costs at least.

    >>> explain("trelu", torch.zeros(4))  # doctest: +SKIP

    Raises:
        ValueError: no such operator.
    """
    counts: dict[str, Callable[..., tuple[int, int, Tensor]]] = {
        "trelu": _trelu,
        "depthwise_conv2d": _depthwise,
        "separable_conv2d": _separable,
    }
    if operator not in counts:
        raise ValueError(f"operator must be one of {', '.join(counts)}, got {operator!r}")
    moved, operations, x = counts[operator](*args, **kwargs)
    return Explanation(operator, choose(operator, x), moved * x.element_size(), operations)


def _trelu(x: Tensor, inplace: bool = False) -> tuple[int, int, Tensor]:
    return 2 * x.numel(), x.numel(), x


def _image(
    x: Tensor, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, name: str = "weight"
) -> tuple[int, Tensor]:
    """Output pixels of the whole batch, and the batched image."""
    window = _checks.window(x, weight, stride, padding, dilation, name)
    x = window.pad_extra(x if x.dim() == 4 else x[None])
    height, width = ops.output_size(x, weight.shape[2:], window.stride, window.padding, window.dilation)
    return x.shape[0] * height * width, x


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> tuple[int, int, Tensor]:
    pixels, x = _image(x, weight, stride, padding, dilation)
    outputs = pixels * x.shape[1]
    return x.numel() + weight.numel() + outputs, 2 * outputs * weight[0].numel(), x


def _separable(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    inner_activation: str | None = None,
    activation: str | None = None,
) -> tuple[int, int, Tensor]:
    pixels, x = _image(x, depthwise_weight, stride, padding, dilation, "depthwise_weight")
    weights = depthwise_weight.numel() + pointwise_weight.numel()
    moved = x.numel() + weights + pixels * pointwise_weight.shape[0]
    return moved, 2 * pixels * weights, x
