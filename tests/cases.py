"""Random calls of the operators, one generator for all backends. Hypothesis draws the calls and shrinks a failing one.

A case is plain numbers. The test makes its tensors by evaluating the very expressions that :meth:`Case.program` prints,
so the three lines printed for a failing case do what the test did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from rkl_kernels._checks import ACTIVATIONS

FUNCTIONS = {"trelu": "trelu", "depthwise": "depthwise_conv2d", "separable": "separable_conv2d"}
TYPES = (torch.float32, torch.bfloat16, torch.float16)

VALUES = {
    "plain": "torch.randn({n})",
    "tiny": "torch.randn({n}) * (torch.finfo({dtype}).tiny / 4)",
    "huge": "torch.randn({n}) * (torch.finfo({dtype}).max / 8)",
    "special": "torch.randn({n}) / torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, float('inf'), float('nan')])"
    "[torch.randint(10, ({n},))]",
}
"""What a storage is filled with. "special" has infinities, zeros and NaNs."""


@dataclass(frozen=True)
class View:
    """A tensor as a view of a row of random numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    values: str = "plain"

    def text(self, dtype: torch.dtype) -> str:
        """The Python expression that makes the tensor."""
        reach = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        count = self.offset + (reach + 1 if all(self.shape) else 0)
        numbers = VALUES[self.values].format(n=count, dtype=dtype)
        if dtype.is_complex:
            numbers = f"torch.randn({count}, dtype={dtype})"
        return f"({numbers}).to({dtype}).as_strided({self.shape}, {self.strides}, {self.offset})"


@dataclass(frozen=True)
class Case:
    """A call of a public function and its backward.

    ``grad`` is the output's gradient, or None where the call must fail. ``wanted`` says which tensors have
    ``requires_grad``.
    """

    operator: str
    dtype: torch.dtype
    seed: int
    tensors: tuple[View | None, ...]
    grad: View | None
    wanted: tuple[bool, ...]
    window: tuple[Any, ...] = ()
    activations: tuple[str | None, ...] = ()

    def _expressions(self) -> list[str]:
        texts = []
        for view, wanted in zip(self.tensors, self.wanted, strict=True):
            made = None if view is None else view.text(self.dtype)
            texts.append(f"{made}.requires_grad_()" if made and wanted else str(made))
        return texts

    def make(self) -> tuple[list[Tensor | None], Tensor | None]:
        """The tensors, and the output's gradient."""
        torch.manual_seed(self.seed)
        tensors = [eval(text, {"torch": torch}) for text in self._expressions()]
        return tensors, None if self.grad is None else eval(self.grad.text(self.dtype), {"torch": torch})

    def call(self, library: Any, tensors: list[Tensor | None]) -> Tensor:
        """The output, of ``rkl_kernels`` or its reference."""
        return getattr(library, FUNCTIONS[self.operator])(*tensors, *self.window, *self.activations)

    def run(self, library: Any, tensors: list[Tensor | None], grad: Tensor | None) -> list[Tensor]:
        """The output and the gradients of the tensors that have ``requires_grad``."""
        y = self.call(library, tensors)
        leaves = [t for t in tensors if t is not None and t.requires_grad]
        return [y.detach(), *(torch.autograd.grad(y, leaves, grad) if leaves else ())]

    def program(self, backend: str) -> str:
        """Three lines of Python that make the same call."""
        settings = ", ".join(map(repr, (*self.window, *self.activations)))
        grad = "" if self.grad is None else f"grad = {self.grad.text(self.dtype)}; "
        call = f"y = rk.{FUNCTIONS[self.operator]}(*tensors{', ' if settings else ''}{settings})"
        back = "print(torch.autograd.grad(y, [t for t in tensors if t is not None and t.requires_grad], grad))"
        return (
            f"import torch, rkl_kernels as rk; torch.manual_seed({self.seed})\n"
            f"tensors = [{', '.join(self._expressions())}]; {grad}\n"
            f"with rk.use_backend({backend!r}): {call}; print(y){f'; {back}' if any(self.wanted) and grad else ''}"
        )


def examples(share: float) -> settings:
    """Draw this share of the profile's cases: 500 in ``make test``, 10,000 in ``make fuzz`` (conftest.py)."""
    return settings(max_examples=round(share * settings().max_examples))


def dense_strides(shape: tuple[int, ...], order: tuple[int, ...]) -> list[int]:
    """Strides of a dense tensor. ``order`` lists the dimensions, innermost first."""
    strides, step = [1] * len(shape), 1
    for dim in order:
        strides[dim] = step
        step *= max(shape[dim], 1)
    return strides


def orders(dims: int) -> dict[str, tuple[int, ...]]:
    plain = tuple(reversed(range(dims)))
    nhwc = {4: (1, 3, 2, 0), 3: (0, 2, 1)}.get(dims, plain)
    return {"contiguous": plain, "channels_last": nhwc, "transposed": (*plain[1::-1], *plain[2:])}


LAYOUTS = (
    ("contiguous",) * 4 + ("channels_last",) * 4 + ("transposed", "sliced", "sliced nhwc", "expanded", "overlapping")
)


@st.composite
def views(draw: Callable[..., Any], shape: tuple[int, ...], layouts: tuple[str, ...] = LAYOUTS) -> View:
    """A view of ``shape`` in any layout, at any offset into its storage."""
    layout, dims = draw(st.sampled_from(layouts)), len(shape)
    order = orders(dims)
    if layout == "overlapping":
        strides = [draw(st.integers(1, 5)) for _ in shape]
    elif layout.startswith("sliced"):
        larger = tuple(size + draw(st.sampled_from((0, 1, 3, 8))) for size in shape)
        strides = dense_strides(larger, order["channels_last" if "nhwc" in layout else "contiguous"])
    else:
        strides = dense_strides(shape, order.get(layout, order["contiguous"]))
    if layout == "expanded":
        strides = [draw(st.sampled_from((0, s))) for s in strides]
    return View(shape, tuple(strides), draw(st.sampled_from((0, 0, 0, 0, 8, 1, 3))))


CHANNELS = (1, 2, 3, 5, 7, 8, 8, 16, 16, 17, 24, 31, 32, 33, 40, 64, 72, 96, 136)
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 24, 28, 33, 56, 70)
KERNELS = ((1, 1), (3, 3), (3, 3), (3, 3), (5, 5), (7, 7), (2, 2), (4, 3), (1, 9), (11, 2), (13, 13), (3, 31))


def _fitted(sizes: list[int], taps: int, most: int) -> list[int]:
    """Batch, channels, height and width. Halve the largest until there are at most ``most`` products."""
    while sizes[0] * sizes[1] * sizes[2] * sizes[3] * taps > most:
        largest = max(range(4), key=lambda d: sizes[d])
        if sizes[largest] == 1:
            break
        sizes[largest] //= 2
    return sizes


@st.composite
def windows(draw: Callable[..., Any], kernel: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Stride, padding and dilation in any form that a caller may write: a number, a pair or a word."""

    def pair(strategy: Any) -> Any:
        return draw(strategy) if draw(st.booleans()) else (draw(strategy), draw(strategy))

    dilation = pair(st.sampled_from((1, 1, 1, 1, 2, 3)))
    reach = [d * (k - 1) for d, k in zip((dilation,) * 2 if type(dilation) is int else dilation, kernel, strict=True)]
    stride = pair(st.sampled_from((1, 1, 1, 2, 2, 3, 9)))
    half = st.just((reach[0] // 2, reach[1] // 2))
    padding = draw(st.one_of(half, half, half, st.integers(0, max(kernel) + 3), st.tuples(*[st.integers(0, 9)] * 2),
                             st.sampled_from(("same", "valid", 0))))  # fmt: skip
    return stride if padding != "same" or draw(st.integers(0, 9)) == 0 else 1, padding, dilation


def _size(image: tuple[int, ...], kernel: tuple[int, int], window: tuple[Any, Any, Any]) -> list[int] | None:
    """The output's height and width by ``F.conv2d``, or None where that raises."""
    x, weight = (torch.empty(shape, device="meta") for shape in ((1, 1, *image[-2:]), (1, 1, *kernel)))
    try:
        return list(F.conv2d(x, weight, None, *window).shape[2:])
    except RuntimeError:
        return None


@st.composite
def cases(draw: Callable[..., Any], operator: str, most: int = 1_000_000, types: tuple[torch.dtype, ...] = TYPES,
          empty: bool = True, nonfinite: bool = True) -> Case:  # fmt: skip
    """A case of an operator.

    ``most`` bounds the products of the depthwise step. ``empty`` allows sizes of 0, ``nonfinite`` infinities and NaNs.
    """
    dtype, seed = draw(st.sampled_from(types)), draw(st.integers(0, 2**31 - 1))
    some = (0,) if empty else ()
    if operator == "trelu":
        shape = tuple(draw(st.lists(st.sampled_from((*some, *SIZES)), max_size=4)))
        while torch.Size(shape).numel() > 30_000:
            shape = shape[:-1]
        shapes: list[tuple[int, ...] | None] = [shape]
        out, window, activations = shape, (), ()
    else:
        kernel = draw(st.sampled_from(KERNELS))
        batch, channels = draw(st.sampled_from((*some, 1, 1, 2, 2, 3, 9))), draw(st.sampled_from((*some, *CHANNELS)))
        height, width = (draw(st.sampled_from((*some, *SIZES))) for _ in range(2))
        image = tuple(_fitted([batch, channels, height, width], kernel[0] * kernel[1], most))
        channels = image[1]
        outputs = draw(st.sampled_from((*some, *CHANNELS))) if operator == "separable" else channels
        image = image[1:] if draw(st.integers(0, 9)) == 0 else image
        window = draw(windows(kernel))
        bias = [(n,) if draw(st.booleans()) else None for n in (channels, outputs)]
        shapes = [image, (channels, 1, *kernel)]
        shapes += [(outputs, channels, 1, 1), *bias] if operator == "separable" else bias[:1]
        named = st.sampled_from((None, None, *ACTIVATIONS))
        activations = (draw(named), draw(named)) if operator == "separable" else ()
        size = _size(image, kernel, window)
        out = None if size is None else (*image[:-3], outputs, *size)
    tensors = [None if s is None else draw(views(s)) for s in shapes]
    grad = None if out is None else draw(views(out))
    odd = draw(st.sampled_from(("plain",) * 7 + ("tiny", "huge") + ("special",) * nonfinite))
    if odd != "plain":
        present = [i for i, t in enumerate([*tensors, grad]) if t is not None]
        at = draw(st.sampled_from(present))
        old = [*tensors, grad][at]
        new = View(old.shape, old.strides, old.offset, odd)
        if at == len(tensors):
            grad = new
        else:
            tensors[at] = new
    wanted = tuple(t is not None and draw(st.integers(0, 3)) > 0 for t in tensors)
    return Case(operator, dtype, seed, tuple(tensors), grad, wanted, window, activations)
