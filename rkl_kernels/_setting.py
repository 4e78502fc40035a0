"""Settings that hold for one thread in a ``with`` block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Setting(threading.local, Generic[T]):
    """A value that each thread has its own copy of.

    It is not a context variable, since torch.compile can read, set and guard on a thread-local value, but not on a
    context variable (torch 2.13).
    """

    def __init__(self, value: T) -> None:  # threading.local calls this in each thread that uses it
        self.value = value

    @contextmanager
    def held(self, value: T) -> Iterator[None]:
        """Set ``value`` in the block and restore the former value after it."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before
