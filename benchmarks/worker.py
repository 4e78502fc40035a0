"""A separate process for work on a device. A kernel that accesses memory where it must not ends the CUDA context of its
process, and a kernel that hangs blocks the process. Then the next call gets a new process."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

# Spawned: a CUDA context does not survive a fork.
_context = multiprocessing.get_context("spawn")


def _serve(connection: Connection) -> None:
    while True:
        function, arguments = connection.recv()
        try:
            answer = (function(*arguments), "")
        except Exception:  # any error: the calling process gets it, and raises it
            answer = (None, traceback.format_exc())
        connection.send(answer)


class Worker:
    """Calls functions of importable modules in a process of its own, which starts at the first call."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None

    def call(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of ``function(*arguments)``. After an error the next call gets a new process.

        Raises:
            TimeoutError: no answer within ``seconds``.
            RuntimeError: the function raised (the message has the whole traceback), or the process ended.
        """
        if self._process is None:
            self._connection, theirs = _context.Pipe()
            self._process = _context.Process(target=_serve, args=(theirs,))
            self._process.start()
            theirs.close()  # so that the end of the process is an end of file here
        try:
            self._connection.send((function, arguments))
            if not self._connection.poll(seconds):
                raise TimeoutError(f"no answer after {seconds:.0f} s")
            value, error = self._connection.recv()
        except TimeoutError:
            self.stop()
            raise
        except (EOFError, OSError):
            process = self._process
            self.stop()
            raise RuntimeError(f"the process ended with code {process.exitcode}") from None
        if error:
            self.stop()
            raise RuntimeError(error)
        return value

    def stop(self) -> None:
        """Kill the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None
