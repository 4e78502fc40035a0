"""How a process holds its memory on a CPU: settings of glibc's allocator, for programs that train or measure.

The library calls none of these: they are for the whole process, so its owner's choice.
"""

from __future__ import annotations

import ctypes
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Make glibc's allocator keep what is freed for what comes next, from here on.

    By default every tensor over 32 MiB is mapped anew and freed memory goes back to the kernel, so that each 4 KiB cost
    a page fault again: 32,768 of them for two tensors of 64 MiB, at each step of a loop that makes them
    (tests/test_rkl_memory.py). A process with any caching allocator does not pay that.

    Returns:
        False where the allocator is not glibc's; nothing is changed then.

    Examples:
        >>> from rkl_kernels.allocator import keep_freed_memory
        >>> kept = keep_freed_memory()
    """
    # 0 mappings: the heap alone serves. -1: its free end is never given back (mallopt(3)).
    return _mallopt((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))


def return_gaps() -> bool:
    """Give the kernel, once, the pages of the heap that hold nothing; False where there is no glibc.

    A gap between two tensors in use is rarely taken again by one of the same size, since aligned memory needs more room
    than it keeps. So a heap grows, kept or not, where large and small tensors come and go.
    """
    trim = glibc_function("malloc_trim")
    if trim is None:
        return False
    trim(0)
    return True


def glibc_function(name: str) -> Any:
    """A function of the C library that glibc alone has; None elsewhere."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library, or a system whose programs cannot be asked so
        return None


def _mallopt(*settings: tuple[int, int]) -> bool:
    mallopt = glibc_function("mallopt")
    return mallopt is not None and all(mallopt(parameter, value) for parameter, value in settings)
