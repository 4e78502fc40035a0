"""An error in one line, for a table's cell or a line of print."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what an error says; some say nothing, such as that of a bare ``assert``."""
    return next(iter(str(error).strip().splitlines()), "without a message")


def told(error: BaseException) -> str:
    """Its kind, and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}"
