"""Settings of glibc's memory allocator, for programs that train or measure on a CPU.

The library never calls these functions: they change the whole process, so the program must decide.
"""

from __future__ import annotations

import ctypes
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """From now on, make glibc's allocator keep freed memory for the next allocations.

    By default glibc maps every tensor over 32 MiB anew and returns freed memory to the kernel. Then each 4 KiB cost a
    page fault again: 32,768 faults for two tensors of 64 MiB, at each step of a loop that allocates them
    (tests/test_rkl_memory.py). A process with a caching allocator does not have this cost.

    Returns:
        Whether the allocator is glibc's. Where it is not, nothing is changed.

    Examples:
        >>> from rkl_kernels.allocator import keep_freed_memory
        >>> kept = keep_freed_memory()
    """
    # 0 mappings: all memory comes from the heap. -1: the free end of the heap is never returned (mallopt(3)).
    return _mallopt((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))


def return_gaps() -> bool:
    """Return the unused pages of the heap to the kernel, once. False where the C library is not glibc.

    A gap between two tensors rarely fits another tensor of the same size, since an aligned allocation asks for more
    room than it keeps. So a heap grows where large and small tensors come and go, whether freed memory is kept or not.
    """
    trim = glibc_function("malloc_trim")
    if trim is None:
        return False
    trim(0)
    return True


def glibc_function(name: str) -> Any:
    """A function that only glibc has; None with another C library."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library, or a system where ctypes cannot open the program
        return None


def _mallopt(*settings: tuple[int, int]) -> bool:
    mallopt = glibc_function("mallopt")
    return mallopt is not None and all(mallopt(parameter, value) for parameter, value in settings)
