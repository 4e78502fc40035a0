"""Which Triton kernels a separable convolution is given: one kernel, or depthwise kernel and matrix product.

Fusing saves writing and reading the depthwise output, and loses where the depthwise tile has to be made more than once
(all output channels do not fit into one block) or where the product alone decides and the library's is the better one.
Decided by counts of bytes and operations over the device's rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from ._setting import Setting

_override: Setting[bool | None] = Setting(None)


@dataclass(frozen=True)
class Rates:
    """What a GPU moves and does in a second: bytes from memory and from the L1 caches, taps of the depthwise tile that
    the fused kernel makes, operations of the matrix product on tensor cores in 16 bits and TF32 and on scalar units;
    and the seconds that one more launch costs."""

    memory: float
    cache: float
    tile: float
    tensor: float
    tf32: float
    scalar: float
    launch: float = 5e-6


# From the data sheets (A100 80 GB, H100 SXM); cache: 128 bytes a clock and processor. tile: measured on an H200, where
# 13 layers of 3 x 3 at stride 1 in bf16 took 8 to 16 ns a thousand elements of the tile; for sm_80 in proportion to
# the cache. Writing and reading an element in memory costs a tenth of that, so fusing pays for hardly any filter.
RATES = {
    80: Rates(memory=2.0e12, cache=19.5e12, tile=0.57e12, tensor=312e12, tf32=156e12, scalar=19.5e12),
    90: Rates(memory=3.35e12, cache=28.7e12, tile=0.85e12, tensor=989e12, tf32=495e12, scalar=67e12),
}
LIBRARY_SHARE = 0.7  # of the data sheet's rate that a library's large product reaches
FUSED_SHARE = {"tensor": 0.4, "tf32": 0.4, "scalar": 0.25}
"""The same for the product inside the fused kernel, which makes its operand between two steps; assumed, unmeasured."""


@dataclass(frozen=True)
class Separable:
    """A separable convolution's sizes, as the counts need them."""

    images: int
    channels: int
    outputs: int
    in_pixels: int
    out_pixels: int
    taps: int
    element: int
    backward: bool

    @property
    def image(self) -> int:
        return self.images * self.in_pixels * self.channels * self.element

    @property
    def middle(self) -> int:
        return self.images * self.out_pixels * self.channels * self.element

    @property
    def output(self) -> int:
        return self.images * self.out_pixels * self.outputs * self.element

    @property
    def product(self) -> int:
        """Operations of the pointwise step; the backward has two of them."""
        return 2 * self.images * self.out_pixels * self.channels * self.outputs * (2 if self.backward else 1)


@dataclass(frozen=True)
class Choice:
    """Fused or not, with the reason; the counts are of bytes to and from memory."""

    fused: bool
    reason: str
    fused_bytes: int
    composed_bytes: int


def architecture(x: Tensor) -> int:
    """Row of the tables for the tensor's device: 90 (and later), 80; 90 stands in for a CPU that plays a GPU."""
    return _architecture(x.device.index) if x.device.type == "cuda" else 90


@cache
def _architecture(index: int) -> int:
    return 90 if torch.cuda.get_device_capability(index) >= (9, 0) else 80


@lru_cache(4096)
def choose(work: Separable, unit: str, arch: int, block: int) -> Choice:
    """The choice for ``work`` with the product on ``unit`` ("tensor", "tf32" or "scalar"), ``block`` output channels a
    program of the fused kernel."""
    rates = RATES[arch]
    repeats = -(-work.outputs // block)
    if work.backward:
        # both: the depthwise backward that follows. composed: make the middle, read it for the filter's gradient, write
        # its gradient; the output's gradient is read twice.
        fused_bytes = work.image + work.output + work.middle
        composed_bytes = work.image + 2 * work.output + 3 * work.middle
    else:
        fused_bytes = work.image + work.output
        composed_bytes = work.image + work.output + 2 * work.middle
    taps = work.middle * work.taps / rates.cache
    made = work.middle / work.element * work.taps / rates.tile
    rate = getattr(rates, unit)
    fused = max(fused_bytes / rates.memory, repeats * made + work.product / (FUSED_SHARE[unit] * rate))
    composed = (
        max((work.image + work.middle) / rates.memory, taps)
        + max((composed_bytes - work.image - work.middle) / rates.memory, work.product / (LIBRARY_SHARE * rate))
        + rates.launch
    )
    saved = 100 * (1 - fused_bytes / composed_bytes)
    counts = f"fusing moves {saved:.0f}% fewer bytes"
    if fused <= composed:
        return Choice(True, f"{counts}: {fused * 1e6:.3g} us by count, composed {composed * 1e6:.3g} us",
                      fused_bytes, composed_bytes)  # fmt: skip
    why = f"makes the depthwise tile {repeats} times" if repeats > 1 else "has the slower depthwise step and product"
    reason = f"{counts} but {why}: {fused * 1e6:.3g} us by count, composed {composed * 1e6:.3g} us"
    return Choice(False, reason, fused_bytes, composed_bytes)


def fuse_separable(
    x: Tensor, depthwise: Tensor, outputs: int, out_size: Sequence[int], unit: str, block: int, backward: bool
) -> Choice:
    """The choice for a call with these tensors; :func:`use_fusion` overrides it."""
    n, channels, in_h, in_w = x.shape
    work = Separable(
        n, channels, outputs, in_h * in_w, out_size[0] * out_size[1], depthwise.shape[2] * depthwise.shape[3],
        x.element_size(), backward,
    )  # fmt: skip
    choice = choose(work, unit, architecture(x), block)
    overrule = overruled()
    if overrule is None:
        return choice
    return Choice(overrule, "set by use_fusion", choice.fused_bytes, choice.composed_bytes)


def use_fusion(fused: bool | None) -> AbstractContextManager[None]:
    """Overrule the planner in the block: always fused, never fused, or (None) the planner's own choice again.

    It holds for the calling thread, and for forward calls: a backward obeys what held for its forward.
    """
    return _override.held(fused)


def overruled() -> bool | None:
    """What :func:`use_fusion` says here; None where the planner chooses."""
    return _override.value
