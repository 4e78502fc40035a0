"""Launch configurations, by architecture: 80 and 90 are GPUs, 0 is the interpreter, whose cost is by program.

Few, and chosen by count rather than by trial at run time. ``benchmarks/static_triton.py`` compiles each of them and
holds it to no spills and to a block's shared memory; what is said of registers and spills below was read off it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .launch import architecture

PROGRAMS = 1056
"""Programs that a gradient with partial sums aims at: 8 for each of the 132 processors of the largest GPU."""


@dataclass(frozen=True)
class Gather:
    """Pixels and channels of one program of the depthwise kernel, and its warps."""

    pixels: int
    channels: int
    warps: int


# 64 channels of 16 bits are one 128-byte line; 32 pixels keep the float32 sums at 16 registers a thread, which leaves
# room for the loads of nine taps (64 pixels took 180 registers, and spilled in NCHW).
GATHER = {0: Gather(1024, 64, 4), 80: Gather(32, 64, 4), 90: Gather(32, 64, 4)}


@dataclass(frozen=True)
class Window:
    """Columns and channels of one program of the moving window, and its warps."""

    columns: int
    channels: int
    warps: int


# Up to nine taps stay in registers beside the sums of three output rows: 8 outputs a thread are 144 registers, 16 were
# 220. Of larger filters the taps are read again for each row, which pays the more outputs share one: 16 a thread are 18
# instructions an output and column of seven taps, 8 were 28.
SMALL_WINDOW = {0: Window(1024, 64, 4), 80: Window(16, 64, 4), 90: Window(16, 64, 4)}
WINDOW = {0: Window(1024, 64, 4), 80: Window(32, 64, 4), 90: Window(32, 64, 4)}


# Of the depthwise weight gradient: the sums of (pixels, taps, channels) in registers, 32 a thread.
GRADIENT_SUMS = {0: 1 << 20, 80: 4096, 90: 4096}
GRADIENT_TAPS = 64  # in one program; the taps of larger filters are shared out among programs
GRADIENT_CHANNELS = 64


@dataclass(frozen=True)
class Product:
    """Pixels, output channels and input channels of one step of the matrix product, warps and pipeline stages."""

    pixels: int
    outputs: int
    channels: int
    warps: int
    stages: int = 2


# By what the product runs on (:func:`unit`). Scalar units want small tiles: their code is unrolled.
FORWARD = {
    (0, "tensor"): Product(512, 128, 64, 4),
    (0, "tf32"): Product(512, 128, 64, 4),
    (0, "scalar"): Product(512, 128, 64, 4),
    # 256 outputs in one block, so that up to there the depthwise tile is made once; the same tile spills on sm_80.
    (90, "tensor"): Product(64, 256, 32, 8),
    (90, "tf32"): Product(64, 256, 32, 8),
    (90, "scalar"): Product(32, 64, 16, 4),
    (80, "tensor"): Product(64, 128, 32, 8),
    (80, "tf32"): Product(64, 128, 32, 8),
    (80, "scalar"): Product(32, 64, 16, 4),
}
# All output channels stand in one block: the tile's `outputs` is the most that the fused backward takes. 256 spill, and
# so do 128 in TF32.
BACKWARD = {
    (0, "tensor"): Product(512, 256, 64, 4),
    (0, "tf32"): Product(512, 256, 64, 4),
    (0, "scalar"): Product(512, 256, 64, 4),
    (90, "tensor"): Product(64, 128, 32, 8),
    (90, "tf32"): Product(64, 64, 32, 8),
    (90, "scalar"): Product(16, 64, 16, 4),
    (80, "tensor"): Product(32, 128, 32, 8),
    (80, "tf32"): Product(32, 64, 32, 8),
    (80, "scalar"): Product(16, 64, 16, 4),
}


def unit(x: Tensor) -> str:
    """Where the product runs: on tensor cores in 16 bits or, where torch allows it, in TF32; else on scalar units."""
    if x.dtype != torch.float32:
        return "tensor"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "scalar"


def product(x: Tensor, outputs: int, backward: bool) -> Product:
    """The separable kernels' row for an image and a number of output channels, cut to what there is of either."""
    row = (BACKWARD if backward else FORWARD)[architecture(x), unit(x)]
    # tl.dot takes no side under 16.
    fit = [max(16, triton.next_power_of_2(n)) for n in (outputs, x.shape[1])]
    return Product(row.pixels, min(row.outputs, fit[0]), min(row.channels, fit[1]), row.warps, row.stages)
