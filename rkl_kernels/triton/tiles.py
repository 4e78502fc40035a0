"""Launch configurations, by architecture: 80 and 90 are GPUs, 0 is the interpreter, whose cost is by program.

Few, and chosen by count rather than by trial at run time. ``benchmarks/static_triton.py`` compiles each of them and
holds it to no spills and to a block's shared memory; what is said of registers and spills below was read off it.
"""

from __future__ import annotations

from dataclasses import dataclass

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
