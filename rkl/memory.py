"""Too little memory, as Python and PyTorch tell it."""

from __future__ import annotations


def shortage(error: BaseException) -> str | None:
    """What an error says about memory that is short, in one line; None for any other error.

    Examples:
        >>> from rkl.memory import shortage
        >>> shortage(MemoryError("Unable to allocate\\n9 TiB")), shortage(ValueError("width must be at least 1"))
        ('Unable to allocate 9 TiB', None)
    """
    text = " ".join(str(error).split())
    known = isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text
    return (text[:160] or "no more of it") if known else None
