"""Files of records: written whole or not at all; read with one line that names the file where it is damaged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AGAIN = "run the command again"
"""The remedy where nothing is left of what failed, or the command goes on by itself."""


class RunError(ValueError):
    """A run folder or checkpoint that cannot be used; the message is one line that names the file and the rule."""


class UnwritableError(RunError):
    """A file that cannot be written, for want of space say."""

    def __init__(self, path: Path, error: OSError, remedy: str = AGAIN) -> None:
        self.path, self.error = path, error
        super().__init__(f"{path}: must be writable, got: {error.strerror or error}; mend that and {remedy}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in the block, which takes the place of ``path`` once it is on the disk; until then, and where
    anything fails, ``path`` is as it was.

    Raises:
        UnwritableError: it cannot be written.
    """
    partial = _beside(path)
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # a rename may reach the disk before the content does
        os.replace(partial, path)
    except BaseException as error:  # an interrupt too: no draft may be left behind
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UnwritableError(path, error) from error
        raise


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A folder, made where there is none, that no other process holds in the block. The system lets go of it however
    this process ends, so no lock outlives a kill, and no file says so.

    Raises:
        UnwritableError: it cannot be made or looked into.
        RunError: another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UnwritableError(folder, error) from error
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{folder}: out must be a folder that no other process trains in, got one that does; wait for its end, "
                "or give another folder"
            ) from None
        except OSError:
            pass  # a file system that knows no locks
        yield
    finally:
        os.close(place)


def _beside(path: Path) -> Path:
    """The file that is written before it becomes ``path``, in a folder that is there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableError(path, error) from error
    return path.with_name(f".{path.name}.partial")


def check_writable(*paths: Path) -> None:
    """Tell before the work what :func:`replacing` would tell after it: a folder that cannot be made or written in, or
    that has a file's name.

    Raises:
        UnwritableError: the first that cannot be written.
    """
    for path in paths:
        partial = _beside(path)
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            partial.touch()
            partial.unlink()
        except OSError as error:
            raise UnwritableError(path, error) from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in UTF-8 whatever the machine's locale."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_figure(figure: Figure, path: Path, **settings: Any) -> None:
    """Draw a figure into a file, whole or not at all, in the form that the file's ending names."""
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], **settings)


def to_json(record: object, indent: int | None = None) -> str:
    """JSON that every reader takes: its standard knows neither nan nor infinity, so those are null."""
    return json.dumps(_finite(record), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


MEASURED = {"test", "val", "losses", "training_loss", "norms", "shares"}
"""What holds numbers alone in a run's records and log, so that null is a number that was not finite."""


def _measured(record: dict[str, Any]) -> dict[str, Any]:
    return {key: _numbers(value) if key in MEASURED else value for key, value in record.items()}


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.nan if value is None else value


def read_record(path: Path) -> dict[str, Any]:
    """A run's metrics.json or gradients.json, its numbers as :func:`to_json` took them; raises as :func:`read_json`."""
    return _measured(read_json(path, "a run's record"))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a JSON file, which should be ``what``.

    Raises:
        RunError: it holds anything else.
        OSError: it cannot be read.
    """
    with understood(path, what):
        record = json.loads(path.read_text())
        if not isinstance(record, dict):
            raise TypeError(f"{type(record).__name__} in place of a mapping")
        return record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The epochs in a run's log.jsonl; none where there is no such file. A last line without its end is what is left of
    one that was being written when its run was killed, before its checkpoint, and is not counted."""
    if not path.exists():
        return []
    with understood(path, "a run's log"):
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        for row in rows:
            if not isinstance(row["epoch"], int):
                raise TypeError(f"epoch {row['epoch']!r}")
        return [_measured(row) for row in rows]


@contextmanager
def understood(path: Path, what: str) -> Iterator[None]:
    """Where a record read in the block is not what it should be, say so in one line that names its file."""
    try:
        yield
    except (RunError, OSError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise RunError(f"{path}: must be {what}, got a damaged one ({reason})") from error
