"""How far a kernel's result may be from the exact one: by the rounding error of its arithmetic, and no more.

A sum of n products in float32, in any order, is off by at most about n * 2^-24 times the sum of the products'
magnitudes. Storing it in a type with unit roundoff u adds u times the value. So each comparison needs the exact result
in float64 and also the same computation on absolute values.
"""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 0.0, torch.float32: 2.0**-149, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


def assert_rounded(
    result: Tensor,
    exact: Tensor,
    magnitude: Tensor | None = None,
    terms: int = 1,
    roundings: float = 1.0,
    accumulate: torch.dtype = torch.float32,
) -> None:
    """``result`` is ``exact`` up to ``roundings`` roundings in its own type and a sum of ``terms`` in ``accumulate``.

    ``magnitude`` is the computation on absolute values; the default is the absolute value of ``exact``. With
    ``roundings`` > 1, intermediate values are rounded to the result's type too. Those roundings are relative to
    ``magnitude``.
    """
    assert result.shape == exact.shape, f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    unit = UNIT_ROUNDOFF[result.dtype]
    magnitude = exact.abs() if magnitude is None else magnitude
    bound = unit * (exact.abs() + (roundings - 1) * magnitude) + (terms + 4) * UNIT_ROUNDOFF[accumulate] * magnitude
    bound = 1.01 * bound + SMALLEST[result.dtype]
    error = (result.double() - exact).abs()
    both_nan = result.isnan() & exact.isnan()
    same_infinity = (result.double() == exact) & exact.isinf()
    wrong = ~((error <= bound) | both_nan | same_infinity)
    if wrong.any():
        at = tuple(int(i[0]) for i in wrong.nonzero(as_tuple=True))
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} values off; at {at}: got {result[at].item()}, exact "
            f"{exact[at].item()}, bound {bound[at].item():.3g}"
        )


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same image three times: contiguous, channels_last, and as a strided view with gaps."""
    n, c, h, w = x.shape
    gaps = torch.full((n, 2 * c, h, w + 3), float("nan"), dtype=x.dtype)
    strided = gaps[:, ::2, :, 1 : w + 1]
    strided.copy_(x)
    return {"nchw": x.contiguous(), "nhwc": x.contiguous(memory_format=torch.channels_last), "strided": strided}
