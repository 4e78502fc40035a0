"""An error in one line: for a table's cell, a line of print, or another error's message."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or "without a message" (a bare ``assert``, say, has none).

    Examples:
        >>> first_line(ValueError("no such row\\nmore of it"))
        'no such row'
    """
    return next(iter(str(error).strip().splitlines()), "without a message")


def told(error: BaseException) -> str:
    """An error's type and the first line of its message.

    Examples:
        >>> told(AssertionError())
        'AssertionError: without a message'
    """
    return f"{type(error).__name__}: {first_line(error)}"
