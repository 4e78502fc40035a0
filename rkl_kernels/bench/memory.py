"""Measures the peak memory of a piece of work, including what is kept for backward."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

from ..allocator import glibc_function

PERIOD = 5e-4
"""Seconds between two samples. A training step stays longer than this at its peak, the end of forward."""


class _Mallinfo2(ctypes.Structure):
    """``struct mallinfo2`` of glibc's malloc.h."""

    _fields_ = [  # the name that ctypes requires
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()  # noqa: SIM905
    ]


_mallinfo2 = glibc_function("mallinfo2")
if _mallinfo2 is not None:
    _mallinfo2.restype = _Mallinfo2


def allocated() -> int | None:
    """Bytes that this process has allocated and not freed: by torch, its libraries and the kernels' scratch.

    The allocator counts them. The process's resident size would include memory that was freed and kept. None where the
    allocator is not glibc's, 2.33 or newer.
    """
    if _mallinfo2 is None:
        return None
    info = _mallinfo2()
    return int(info.uordblks + info.hblkhd)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes allocated at the peak of ``run()``, minus those allocated before it. Sampled every half millisecond.

    Raises:
        RuntimeError: the allocator does not count what is allocated.
    """
    before = allocated()
    if before is None:
        raise RuntimeError("peak_memory needs glibc 2.33 or newer, whose allocator counts what is in use")
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(PERIOD):
            peak = max(peak, allocated() or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak - before
