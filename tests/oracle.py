"""The expected results of a case: exact values in float64, each with a bound on the error that the arithmetic explains.

This is running error analysis. A :class:`Near` is an exact value and a bound on the distance of the operators' value.
With the unit roundoff u of the type, v = 2^-24 of float32, and gamma_n = n v / (1 - n v):

- A sum of n products in float32, in any order, adds gamma_n times the sum of the products' magnitudes. The errors of
  the factors add to that.
- Rounding to the type adds u times the value, or half of the smallest number.
- An activation passes on the argument's error times its steepest slope, and adds the roundings of its own formula.
- Where a sum of magnitudes reaches float32's largest number, any result is allowed. The same holds where a rounded
  value reaches the type's largest number.
- Where a factor that may be zero meets an infinity, the result must be NaN or an infinity.

Infinities and NaNs must be those of the exact result. The docstrings leave these cases open: a filter's infinities and
NaNs over the zeros of the padding; all taps of a channel's filter gradient where one tap has them; gradients that have
them where a slope is 0; and on a GPU, what :func:`spread` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from exactness import SMALLEST, UNIT_ROUNDOFF
from torch import Tensor

from rkl_kernels import reference
from rkl_kernels.gradients import INVERTIBLE

FREE = 1e200
"""An error that allows any result. It is small enough to stay finite in later products."""
LARGEST = torch.finfo(torch.float32).max
FLOAT32 = UNIT_ROUNDOFF[torch.float32]


@dataclass(frozen=True)
class Rules:
    """How a backend computes.

    ``dtype``: the type of the tensors. ``flushes``: whether it takes denormal factors for zero. ``tanh``: the relative
    error of its T-ReLU. ``parts``: how often a pointwise filter's gradient is rounded to the type on the way.
    ``spread``: how many channels share their infinities and NaNs.
    """

    dtype: torch.dtype
    flushes: bool = False
    tanh: float = 2.0**-22
    parts: int = 0
    spread: int = 0


@dataclass(frozen=True)
class Near:
    """Exact values, and how far off a result may be."""

    value: Tensor
    error: Tensor
    odd: Tensor = field(default_factory=lambda: torch.tensor(False))
    """Where the result may be NaN or either infinity, but not finite."""

    @property
    def size(self) -> Tensor:
        """Magnitudes, without infinities and NaNs."""
        return self.value.abs().nan_to_num(0, 0, 0)


def gamma(terms: int) -> float:
    """The relative error of ``terms`` float32 roundings in a row."""
    return terms * FLOAT32 / (1 - terms * FLOAT32)


def exact(x: Tensor) -> Near:
    x = x.detach().double()
    return Near(x, torch.zeros_like(x))


def _freed(value: Tensor, error: Tensor, where: Tensor) -> Near:
    return Near(value, torch.where(where | ~(error < FREE), FREE, error))


def products(
    rules: Rules, f: Callable[[Tensor, Tensor], Tensor], a: Near, b: Near, terms: int, bias: Near | None = None
) -> Near:
    """``f``: sums of ``terms`` products of the factors, plus one bias for each channel."""
    value, plain, size = f(a.value, b.value), f(a.size, b.size), f(a.size + a.error, b.size + b.error)
    error = size - plain + terms * SMALLEST[torch.float32]
    if rules.flushes:
        tiny = torch.finfo(torch.float32).tiny
        small = [torch.where(t.size < tiny, t.size, 0) for t in (a, b)]
        error = error + f(small[0], b.size) + f(a.size, small[1]) + (terms + 1) * tiny
    if bias is not None:
        shaped = [t[:, None, None] for t in (bias.value, bias.size, bias.error)]
        value, size, error = value + shaped[0], size + shaped[1] + shaped[2], error + shaped[2]
    free, odd = size > LARGEST / 2, torch.tensor(False)
    for one, other, g in ((a, b, f), (b, a, lambda t, u: f(u, t))):
        if (one.error >= FREE).any():  # a NaN counts even where it is multiplied by 0
            free = free | (g((one.error >= FREE).double(), torch.ones_like(other.value)) > 0)
        if other.value.isinf().any():  # a factor that may be 0 or change sign makes NaN or the other infinity of it
            unsure = (one.error > 0) & (one.size <= one.error)
            odd = odd | (g(unsure.double(), other.value.isinf().double()) > 0)
    return replace(_freed(value, error + gamma(terms + 2) * size, free | odd), odd=odd & ~free)


@dataclass(frozen=True)
class Depthwise:
    """The three sums of a depthwise step in float64. They pad the image first."""

    image: tuple[int, ...]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]

    @classmethod
    def of(cls, image: torch.Size, kernel: torch.Size, stride: Any, padding: Any, dilation: Any) -> Depthwise:
        s, d = (tuple(v) if not isinstance(v, int) else (v, v) for v in (stride, dilation))
        reach = [n * (k - 1) for n, k in zip(d, kernel, strict=True)]
        if padding == "same":  # an odd row or column is padded at the end
            pads = (reach[1] // 2, reach[1] - reach[1] // 2, reach[0] // 2, reach[0] - reach[0] // 2)
        else:
            h, w = (0, 0) if padding == "valid" else (padding,) * 2 if isinstance(padding, int) else padding
            pads = (w, w, h, h)
        return cls(tuple(image), tuple(kernel), s, d, pads)

    def _settings(self, channels: int) -> dict[str, Any]:
        return {"stride": self.stride, "dilation": self.dilation, "groups": channels}

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.pads), w, **self._settings(len(w)))

    def _backward(self, grad: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
        groups, none = len(w), [0, 0]
        return torch.ops.aten.convolution_backward(
            grad, x, w, [groups], self.stride, none, self.dilation, False, none, groups, mask
        )

    def of_image(self, grad: Tensor, w: Tensor) -> Tensor:
        x = F.pad(grad.new_zeros(self.image), self.pads)
        dx = self._backward(grad, x, w, [True, False, False])[0]
        left, right, top, bottom = self.pads
        return dx[..., top : dx.shape[2] - bottom, left : dx.shape[3] - right]

    def of_filter(self, x: Tensor, grad: Tensor) -> Tensor:
        w = grad.new_zeros(grad.shape[1], 1, *self.kernel)
        return self._backward(grad, F.pad(x, self.pads), w, [False, True, False])[1]


def over_zeros(f: Callable[[Tensor, Tensor], Tensor], a: Near, w: Near) -> Tensor:
    """Where a filter's infinities or NaNs meet the zeros outside ``a``."""
    odd = (~w.value.isfinite()).double()
    if not odd.any():
        return torch.tensor(False)
    return f(torch.ones_like(a.value), odd) < odd.sum((1, 2, 3))[:, None, None]


def rounded(rules: Rules, x: Near, times: int = 1) -> Near:
    """``x`` after it is rounded to the type ``times`` times."""
    reach = x.size + x.error
    error = x.error + times * (UNIT_ROUNDOFF[rules.dtype] * reach + SMALLEST[rules.dtype])
    return replace(_freed(x.value, error, reach > torch.finfo(rules.dtype).max), odd=x.odd)


STEEPEST = {"relu": 1.0, "relu6": 1.0, "trelu": 1.0, "silu": 1.1, "gelu": 1.13}
BENT = {"relu": 0.0, "relu6": 0.0, "trelu": 0.77, "silu": 0.5, "gelu": 0.8}
"""The largest second derivative. At the kinks of relu and relu6 the slope may be that of either side."""


def activated(rules: Rules, x: Near, name: str | None) -> Near:
    if name is None:
        return x
    value = reference.activate(x.value, name)
    # In silu, exp(-x) carries the rounding of x. In gelu, 1 + erf cancels as erf nears -1. relu is exact.
    size = value.abs().nan_to_num(0, 0, 0)
    own = {"trelu": rules.tanh * size, "silu": gamma(8) * (1 + x.size.clamp(max=100)) * size + 2.0**-120,
           "gelu": gamma(8) * (size + x.size.clamp(max=6))}  # fmt: skip
    error = STEEPEST[name] * x.error + own.get(name, torch.zeros(())) + SMALLEST[torch.float32]
    return _freed(value, error, x.error >= FREE)


def times_slope(rules: Rules, grad: Near, at: Near, name: str | None, output: Near | None = None) -> Near:
    """``grad`` times the slope at ``at``. The operators get the slope from ``output`` where that is given."""
    if name is None:
        return grad
    x = at.value.clone().requires_grad_()
    value, slope = (torch.autograd.grad(reference.activate(x, name), x, g)[0] for g in (grad.value, torch.ones_like(x)))
    told = at if output is None else output
    off = BENT[name] * told.error + gamma(8)
    if name == "trelu":
        off = off + rules.tanh if output is None else 2 * told.size * told.error + told.error**2 + gamma(8)
    for kink in {"relu": (0,), "relu6": (0, 6)}.get(name, ()):
        off = torch.where((told.value - kink).abs() <= told.error, 1.0, off)
    if name == "relu6":  # at a NaN, whether PyTorch passes the gradient on depends on the tensor's size
        off = torch.where(told.value.isnan(), FREE, off)
    off = torch.where(told.error < FREE, off, FREE)
    made = products(rules, torch.mul, grad, Near(slope, off), 1)
    return _freed(value, made.error, ~grad.value.isfinite() & (slope.abs() <= off))


def assert_near(rules: Rules, result: Tensor, near: Near, what: str) -> None:
    """``result`` is the exact value within its error, rounded to the type."""
    assert result.shape == near.value.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(near.value.shape)}"
    unit, most = UNIT_ROUNDOFF[rules.dtype], torch.finfo(rules.dtype).max
    got, want = result.double(), near.value
    bound = 1.001 * (near.error + unit * (near.size + near.error)) + SMALLEST[rules.dtype]
    overflow = (near.size + bound >= most) & (got.sign() == want.sign()) & (got.abs() >= most * (1 - 2 * unit))
    fine = ((got - want).abs() <= bound) | (near.error >= FREE) | overflow
    fine |= (got == want) | (got.isnan() & want.isnan())
    fine &= ~near.odd | ~got.isfinite()
    if not fine.all():
        at = tuple(int(i[0]) for i in (~fine).nonzero(as_tuple=True))
        raise AssertionError(
            f"{what}: {int((~fine).sum())} of {fine.numel()} values off; at {at}: got {got[at].item()}, exact "
            f"{want[at].item()}, bound {bound[at].item():.3g}"
        )


def spread(rules: Rules, image: Near, other: Near) -> Tensor:
    """Which channels of which images (N, C) are open on a GPU.

    All channels of a group are, where ``image`` or ``other`` has an infinity or a NaN in one of them. ``other`` is an
    image too, or a filter (C, 1, kh, kw).
    """
    n, channels = image.value.shape[:2]
    odd = torch.zeros(n, channels, dtype=torch.bool)
    if not rules.spread:
        return odd
    for t in (image, other):
        here = ~t.value.isfinite() | (t.error >= FREE)
        odd |= here.flatten(2).any(2) if t.value.shape[:2] == (n, channels) else here.flatten(1).any(1)
    groups = torch.arange(channels) // rules.spread
    return torch.stack([odd[:, groups == group].any(1) for group in groups], 1)


def depthwise(rules: Rules, window: Depthwise, x: Near, w: Near, bias: Near | None) -> Near:
    y = products(rules, window.forward, x, w, w.value[0].numel(), bias)
    return _freed(y.value, y.error, over_zeros(window.forward, x, w) | spread(rules, x, w)[..., None, None])


def depthwise_gradients(rules: Rules, window: Depthwise, grad: Near, x: Near, w: Near) -> list[Near]:
    """The gradients of image, filter and bias."""
    pixels = grad.value.numel() // max(1, grad.value.shape[1])
    dx = products(rules, window.of_image, grad, w, w.value[0].numel())
    dx = _freed(dx.value, dx.error, over_zeros(window.of_image, grad, w) | spread(rules, grad, w)[..., None, None])
    dw = products(rules, window.of_filter, x, grad, pixels)
    odd = (~dw.value.isfinite() | (dw.error >= FREE)).any(3, True).any(2, True)
    dw = _freed(dw.value, dw.error, odd | spread(rules, x, grad).any(0)[:, None, None, None])
    db = channel_sums(rules, grad)
    return [dx, dw, _freed(db.value, db.error, spread(rules, grad, x).any(0))]


def channel_sums(rules: Rules, grad: Near) -> Near:
    one = exact(torch.ones(()))
    pixels = grad.value.numel() // max(1, grad.value.shape[1])
    return products(rules, lambda g, ones: (g * ones).sum((0, 2, 3)), grad, one, pixels)


def trelu(rules: Rules, x: Tensor, grad: Tensor | None) -> list[Near]:
    """Output and gradient."""
    y = activated(rules, exact(x), "trelu")
    if grad is None:
        return [y]
    return [y, times_slope(rules, exact(grad), exact(x), "trelu", rounded(rules, y))]


def separable(
    rules: Rules, window: Depthwise, tensors: list[Near | None], grad: Near | None, names: tuple[str | None, ...]
) -> list[Near | None]:
    """Output and the five gradients. Values between the steps are rounded to the type.

    A kernel that fuses steps rounds less, so its results lie within the bound too.
    """
    x, w, pointwise, bias, outer_bias = tensors
    inner, outer = names
    channels = {"a": "nchw,oc->nohw", "b": "nohw,oc->nchw", "c": "nohw,nchw->oc"}
    through, back, of_filter = (lambda a, b, e=e: torch.einsum(e, a, b) for e in channels.values())
    filter = Near(pointwise.value.flatten(1), pointwise.error.flatten(1))
    middle = rounded(rules, depthwise(rules, window, x, w, bias))
    left = rounded(rules, activated(rules, middle, inner))
    z = rounded(rules, products(rules, through, left, filter, len(w.value), outer_bias), 2)
    y = activated(rules, z, outer)
    if outer == "gelu":  # where a gradient may be wanted F.gelu follows the operator: from 4 elements on, inf gives NaN
        infinite = z.value.isinf()
        y = replace(_freed(y.value, y.error, infinite), odd=infinite)
    if grad is None:
        return [y]
    told = rounded(rules, y) if outer in INVERTIBLE else None
    dz = rounded(rules, times_slope(rules, grad, z, outer, told))
    pixels = dz.value.numel() // max(1, dz.value.shape[1])
    d_filter = products(rules, of_filter, dz, left, pixels)
    if rules.parts:
        parts = rules.parts * UNIT_ROUNDOFF[rules.dtype] * of_filter(dz.size + dz.error, left.size + left.error)
        d_filter = _freed(d_filter.value, d_filter.error + parts, d_filter.error >= FREE)
    d_filter = Near(d_filter.value[:, :, None, None], d_filter.error[:, :, None, None])
    d_left = rounded(rules, products(rules, back, dz, filter, len(filter.value)))
    d_middle = rounded(rules, times_slope(rules, d_left, middle, inner))
    dx, dw, db = depthwise_gradients(rules, window, d_middle, x, w)
    return [y, dx, dw, d_filter, db, channel_sums(rules, dz)]


def expected(rules: Rules, case: Case, tensors: list[Tensor | None], grad: Tensor | None) -> list[Near]:
    """Output and gradient of every tensor that has ``requires_grad``."""
    grad = grad if any(case.wanted) else None
    if case.operator == "trelu":
        return trelu(rules, tensors[0], grad)
    batched = [t if t is None or t.dim() != 3 else t[None] for t in (*tensors, grad)]
    *near, near_grad = [None if t is None else exact(t) for t in batched]
    window = Depthwise.of(near[0].value.shape, near[1].value.shape[2:], *case.window)
    if case.operator == "separable":
        results = separable(rules, window, near, near_grad, case.activations)
    else:
        results = [depthwise(rules, window, *near)]
        if near_grad is not None:
            results += depthwise_gradients(rules, window, near_grad, near[0], near[1])
    if tensors[0].dim() == 3:
        results[:2] = [Near(r.value[0], r.error[0]) for r in results[:2]]
    return [r for r, wanted in zip(results, (True, *case.wanted), strict=False) if wanted]


def check(
    case: Case, rules: Rules, backend: str, serve: Callable[[list[Tensor | None], Tensor | None], list[Tensor]]
) -> None:
    """``serve`` must return a case's output and gradients, or raise the type of error that the reference raises.

    A failure prints three lines that reproduce it.
    """
    try:
        tensors, grad = case.make()
        before = [None if t is None else t.detach().clone() for t in (*tensors, grad)]
        try:
            like = case.call(reference, [None if t is None else t.detach().double() for t in tensors])
        except Exception as error:  # the backend must raise the same type
            with pytest.raises(type(error)):
                serve(tensors, grad)
            return
        try:
            results = serve(tensors, grad)
        except RuntimeError as error:  # F.gelu's backward refuses an output gradient whose elements overlap in memory
            if "could not construct a memory descriptor using strides" in str(error):
                return
            raise
        assert case.grad is not None
        assert like.shape == case.grad.shape
        for i, (result, near) in enumerate(zip(results, expected(rules, case, tensors, grad), strict=True)):
            assert_near(rules, result, near, "gradient" if i else "output")
        for t, was in zip((*tensors, grad), before, strict=True):
            assert t is None or torch.equal(t.detach().nan_to_num(), was.nan_to_num()), "an argument was written to"
    except Exception as error:  # raise it again with the lines that reproduce it
        raise AssertionError(f"{error}\nThese three lines do it:\n{case.program(backend)}") from error
