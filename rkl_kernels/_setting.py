"""Settings that hold in a ``with`` block of one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Setting(threading.local, Generic[T]):
    """A value of each thread's own.

    A thread's rather than a context variable, since torch.compile can read, set and guard on the one and not on the
    other (torch 2.13).
    """

    def __init__(self, value: T) -> None:  # called again in each thread that asks
        self.value = value

    @contextmanager
    def held(self, value: T) -> Iterator[None]:
        """``value`` in the block, what was there before after it."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before
