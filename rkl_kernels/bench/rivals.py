"""The contestants on PyTorch tensors: this package and PyTorch itself, each in both memory layouts.

A contestant is prepared for a :class:`Case`, which gives a function that does the work once. That function returns the
same tensors as :func:`reference` does for the case: the output, or the gradients. A forward function may be called with
another image than the case's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import rkl_kernels as rk
from rkl_kernels._backends import Backend

from .case import Case

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
TOLERANCES = {"fp32": 2e-4, "tf32": 4e-3, "bf16": 2e-2, "fp16": 4e-3}
"""The largest accepted error, as a share of the largest value. It allows for another order of summation and, in 16
bits, for the rounding of one intermediate tensor. A wrong result is orders of magnitude off."""

PART = 16
"""Images compared at a time. A float64 copy of all 16-bit results would be four times as large as they are."""

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Inputs:
    """The image, the weights and the output's gradient, in float32 and contiguous."""

    x: Tensor
    weights: Results
    grad: Tensor


@lru_cache(maxsize=1)
def _inputs(case: Case, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        # Values that 16 bits can hold, so that one reference serves every type.
        return torch.randn(*shape, generator=generator, device=device).bfloat16().float()

    x = draw(case.batch, case.channels, case.height, case.width)
    if case.operator == "trelu":
        return Inputs(x, (), draw(*x.shape))
    weights = [draw(case.channels, 1, case.kernel, case.filter_width)]
    channels = case.channels
    if case.operator == "separable":
        channels = case.out_channels
        weights.append(draw(channels, case.channels, 1, 1))
    return Inputs(x, tuple(weights), draw(case.batch, channels, case.out_height, case.out_width))


def inputs(case: Case, device: str = "cpu") -> Inputs:
    """The case's tensors, drawn on the device: the same for every type and direction."""
    return _inputs(replace(case, dtype="fp32", direction="forward", name="", tf32=False), device)


def function(case: Case, library: Any = rk) -> Callable[..., Tensor]:
    """The operator as a function of image and weights. ``library``: this package, or its reference in plain PyTorch."""
    window = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    if case.operator == "trelu":
        return library.trelu
    if case.operator == "depthwise":
        return lambda x, weight: library.depthwise_conv2d(x, weight, **window)
    return lambda x, depthwise, pointwise: library.separable_conv2d(
        x, depthwise, pointwise, **window, activation=case.activation
    )


def runner(
    case: Case, operator: Callable[..., Tensor], x: Tensor, weights: Results, grad: Tensor
) -> Callable[..., Any]:
    """A function that does the work of one call in the case's direction. Backward reuses one graph, made here."""
    if case.direction == "forward":

        def forward(image: Tensor = x) -> Results:
            with torch.no_grad():
                return (operator(image, *weights),)

        return forward
    x, weights = x.detach(), tuple(w.detach() for w in weights)
    wanted = {"backward": (x, *weights), "data": (x,), "weight": weights}[case.direction]
    for tensor in wanted:
        tensor.requires_grad_()
    y = operator(x, *weights)
    return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)


@lru_cache(maxsize=1)
def _reference(case: Case, device: str) -> Results:
    given = inputs(case, device)
    x, grad = given.x.double(), given.grad.double()
    return runner(case, function(case, rk.reference), x, tuple(w.double() for w in given.weights), grad)()


def reference(case: Case, device: str = "cpu") -> Results:
    """The right results in float64: the output, or the gradients, the image's first, then the weights'."""
    if case.direction in ("data", "weight"):  # parts of backward, which may be cached
        results = reference(replace(case, direction="backward"), device)
        return results[:1] if case.direction == "data" else results[1:]
    return _reference(replace(case, dtype="fp32", name="", tf32=False), device)


def error(got: Results, want: Results) -> float:
    """The largest error of any result, as a share of that result's largest value. It is inf where a result has another
    shape, or its error is not finite.

    A result that is zero everywhere comes from factors that are zero, and their sums are zero in every type and order.
    So zeros are right there, and any other value is inf off.
    """
    worst = 0.0
    for result, right in zip(got, want, strict=True):
        if result.shape != right.shape:
            return float("inf")
        if not right.numel():
            continue
        largest = right.abs().max()
        for part, right_part in zip(result.detach().split(PART), right.split(PART), strict=True):
            distance = (part.to(right.device, torch.float64) - right_part).abs().max()
            share = distance / largest if distance else distance  # not 0 / 0, which is NaN
            worst = max(worst, float(share) if torch.isfinite(share) else float("inf"))
    return worst


LAYERS = 4
"""How many layers run in a row, where a layer's output can be the next layer's image."""


def layers(case: Case, run: Callable[..., Any], device: str = "cpu") -> tuple[Callable[[], None], int]:
    """The work as in a network, where the next operation reads the output, and the number of layers in it.

    Several layers run in a row where the shape allows it. Elsewhere, on a CPU, an in-place ReLU follows the call. If
    nothing read the output, a kernel that keeps it out of the caches would look faster than it is in a network. On a
    GPU no ReLU follows: the shapes exceed the cache, and the ReLU would take up to as long as the work.
    """
    if case.repeats:

        def in_a_row() -> None:
            (y,) = run()
            for _ in range(LAYERS - 1):
                (y,) = run(y)

        return in_a_row, LAYERS
    if device == "cuda":
        return run, 1

    def followed() -> None:
        run()[0].relu_()

    return followed, 1


def _placed(case: Case, layout: str, device: str) -> tuple[Tensor, Results, Tensor]:
    """The inputs in the case's type and the given layout. All contestants share them."""
    return _of_type(replace(case, direction="forward", name="", tf32=False), layout, device)


@lru_cache(maxsize=len(FORMATS))
def _of_type(case: Case, layout: str, device: str) -> tuple[Tensor, Results, Tensor]:
    given = inputs(case, device)
    kind: Any = {"device": device, "dtype": TYPES[case.dtype], "memory_format": FORMATS[layout]}
    return given.x.to(**kind), tuple(w.to(**kind) for w in given.weights), given.grad.to(**kind)


@dataclass(frozen=True)
class Rival:
    """A contestant.

    Attributes:
        name: the name in tables. "ours" is this package itself.
        layout: "nchw" or "nhwc".
        prepare: ``prepare(case, device)`` returns the function that does the work once.
    """

    name: str
    layout: str
    prepare: Callable[[Case, str], Callable[..., Any]]

    @property
    def id(self) -> str:
        return f"{self.name} {self.layout}"


def ours(layout: str, backend: Backend = "auto") -> Rival:
    """This package, named "ours", or "ours-<backend>" where a backend is given."""

    def prepare(case: Case, device: str) -> Callable[..., Any]:
        if backend == "auto":
            return runner(case, function(case), *_placed(case, layout, device))
        with rk.use_backend(backend):
            run = runner(case, function(case), *_placed(case, layout, device))

        def forced(*image: Tensor) -> Any:
            with rk.use_backend(backend):
                return run(*image)

        return forced

    return Rival("ours" if backend == "auto" else f"ours-{backend}", layout, prepare)


def eager(layout: str) -> Rival:
    """PyTorch's own operators, one after another: the package's reference in the case's own type."""

    def prepare(case: Case, device: str) -> Callable[..., Any]:
        return runner(case, function(case, rk.reference), *_placed(case, layout, device))

    return Rival("eager", layout, prepare)


def compiled(layout: str, mode: str = "default") -> Rival:
    """The operators of :func:`eager` through ``torch.compile``, in its mode ``mode``."""

    def prepare(case: Case, device: str) -> Callable[..., Any]:
        # Each case is compiled alone: the compiler's cache of earlier cases would only lead to its recompilation limit.
        torch._dynamo.reset()
        # Backward runs many times on one graph, so the compiler must not overwrite the buffers kept for backward.
        torch._functorch.config.donated_buffer = False
        operator = torch.compile(function(case, rk.reference), mode=mode, dynamic=False, fullgraph=True)
        return runner(case, operator, *_placed(case, layout, device))

    return Rival("compile", layout, prepare)
