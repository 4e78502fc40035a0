"""How much work one program of each depthwise kernel has, on a GPU and in the interpreter (whose cost is by program).

The numbers are few, the same for every GPU, and chosen by count rather than by trial at run time.
``benchmarks/static_triton.py`` compiles the kernels with them and checks that nothing spills and that the shared memory
of a block suffices. The registers and spills below were read off it, for programs of 4 warps.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._backends import INTERPRETED

PROGRAMS = 1056
"""How many programs a gradient with partial sums aims at: 8 for each of the 132 processors of the largest GPU."""
CHANNELS = 64
"""Channels of one program. In 16 bits they fill one 128-byte line."""
GRADIENT_TAPS = 64
"""Taps of one program of the weight gradient. Several programs share the taps of larger filters."""


@dataclass(frozen=True)
class Tiles:
    """The work of one program.

    Attributes:
        gather: pixels of the gather.
        small_window: columns of the moving window, for filters of up to nine taps.
        window: columns of the moving window, for larger filters.
        gradient_sums: sums of the weight gradient: pixels times taps times channels.
    """

    gather: int
    small_window: int
    window: int
    gradient_sums: int


# Gather: 32 pixels keep the float32 sums at 16 registers a thread, which leaves room for the loads of nine taps (64
# pixels took 180 registers, and spilled in NCHW).
# Window: up to nine taps stay in registers beside the sums of three output rows: 8 outputs a thread take 144 registers,
# 16 took 220. Larger filters read their taps again for each row, which costs less the more outputs share a tap: with 16
# outputs a thread, an output and column of seven taps take 18 instructions; with 8 it was 28.
# Weight gradient: the sums stay in registers, 32 a thread.
GPU = Tiles(gather=32, small_window=16, window=32, gradient_sums=4096)
INTERPRETER = Tiles(gather=1024, small_window=1024, window=1024, gradient_sums=1 << 20)
HERE = INTERPRETER if INTERPRETED else GPU
