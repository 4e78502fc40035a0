"""How much one program of each depthwise kernel has, on a GPU and in the interpreter, whose cost is by program.

Few numbers, the same for every GPU, and chosen by count rather than by trial at run time. With them
``benchmarks/static_triton.py`` compiles, and holds the result to no spills and to a block's shared memory; what is said
of registers and spills below was read off it, for programs of 4 warps.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._backends import INTERPRETED

PROGRAMS = 1056
"""Programs that a gradient with partial sums aims at: 8 for each of the 132 processors of the largest GPU."""
CHANNELS = 64
"""Of 16 bits they are one 128-byte line."""
GRADIENT_TAPS = 64
"""In one program of the weight gradient; the taps of larger filters are shared out among programs."""


@dataclass(frozen=True)
class Tiles:
    """What one program has.

    Attributes:
        gather: pixels of the gather.
        small_window: columns of the moving window, for filters of up to nine taps.
        window: the same for larger ones.
        gradient_sums: sums of the weight gradient, of (pixels, taps, channels).
    """

    gather: int
    small_window: int
    window: int
    gradient_sums: int


# Gather: 32 pixels keep the float32 sums at 16 registers a thread, which leaves room for the loads of nine taps (64
# pixels took 180 registers, and spilled in NCHW).
# Window: up to nine taps stay in registers beside the sums of three output rows: 8 outputs a thread are 144 registers,
# 16 were 220. Of larger filters the taps are read again for each row, which pays the more outputs share one: 16 a
# thread are 18 instructions an output and column of seven taps, 8 were 28.
# Weight gradient: the sums stand in registers, 32 a thread.
GPU = Tiles(gather=32, small_window=16, window=32, gradient_sums=4096)
INTERPRETER = Tiles(gather=1024, small_window=1024, window=1024, gradient_sums=1 << 20)
HERE = INTERPRETER if INTERPRETED else GPU
