"""Files of records. They are written whole or not at all. The error for a damaged file is one line that names it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AGAIN = "run the command again"
"""The remedy where a failure leaves nothing behind, or the command goes on by itself."""


def resuming(folder: Path) -> str:
    """The command that goes on with the run in a folder."""
    return f"rkl train --resume --out {shlex.quote(str(folder))}"


class RunError(ValueError):
    """A run folder or checkpoint cannot be used. The message is one line that names the file and the rule."""


class SettingsError(RunError):
    """A run fails with its settings. ``rule`` is the message without its remedy, which names options of `rkl train`.
    ``elsewhere`` is the remedy for `rkl prune`, which takes the settings from the config.yaml of the run to cut."""

    def __init__(self, rule: str, remedy: str, elsewhere: str) -> None:
        self.rule, self.elsewhere = rule, elsewhere
        super().__init__(f"{rule}; {remedy}")


class UnwritableError(RunError):
    """A file cannot be written, because the disk is full, for example."""

    def __init__(self, path: Path, error: OSError, remedy: str = AGAIN) -> None:
        self.path, self.error = path, error
        super().__init__(f"{path}: must be writable, got: {error.strerror or error}; mend that and {remedy}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in the block, which replaces ``path`` once it is on the disk. Until then, and if anything fails,
    ``path`` is as it was.

    Raises:
        UnwritableError: the file cannot be written.
    """
    partial = _beside(path)
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())  # else the rename may reach the disk before the content
        os.replace(partial, path)
    except BaseException as error:  # an interrupt too: no partial file may stay
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UnwritableError(path, error) from error
        raise


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder for the block, and make it if it does not exist. The lock needs no file, and the system releases it
    however this process ends, even if it is killed.

    Raises:
        UnwritableError: the folder cannot be made or opened.
        RunError: another process has locked it.
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
            pass  # a file system without locks
        yield
    finally:
        os.close(place)


def _beside(path: Path) -> Path:
    """The partial file that is to become ``path``. Its folder is made if it does not exist."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableError(path, error) from error
    return path.with_name(f".{path.name}.partial")


def check_writable(*paths: Path) -> None:
    """Raise, before the work, what :func:`replacing` would raise after it: a folder cannot be made or written in, or a
    folder has the file's name.

    Raises:
        UnwritableError: of the first file that cannot be written.
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
    """Write a file whole or not at all, in UTF-8 in every locale."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_figure(figure: Figure, path: Path, **settings: Any) -> None:
    """Draw a figure into a file, whole or not at all, in the format of the file's suffix."""
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the plot has a box there, which says as much
        figure.savefig(partial, format=path.suffix[1:], **settings)


def to_json(record: object, indent: int | None = None) -> str:
    """JSON that every reader accepts. The standard has neither nan nor infinity, so they become null."""
    return json.dumps(_finite(record), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


MEASURED = {"test", "val", "losses", "training_loss", "norms", "shares"}
"""The entries of a run's records and log that hold only numbers, so that null stands for nan or infinity."""


def _measured(record: dict[str, Any]) -> dict[str, Any]:
    return {key: _numbers(value) if key in MEASURED else value for key, value in record.items()}


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.nan if value is None else value


def read_record(path: Path) -> dict[str, Any]:
    """A run's metrics.json or gradients.json, with nan in place of null. Raises the errors of :func:`read_json`."""
    return _measured(read_json(path, "a run's record"))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a JSON file. ``what`` says in errors what the file should be.

    Raises:
        RunError: the file holds anything else than a mapping.
        OSError: the file cannot be read.
    """
    with understood(path, what):
        record = json.loads(path.read_text())
        if not isinstance(record, dict):
            raise TypeError(f"{type(record).__name__} in place of a mapping")
        return record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The epochs in a run's log.jsonl; an empty list if there is no such file. An unfinished last line is left out: the
    run was killed while it wrote the line, before the epoch's checkpoint."""
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
    """Turn an error of reading a record in the block into a RunError, whose one line names the record's file."""
    try:
        yield
    except (RunError, OSError):
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise RunError(f"{path}: must be {what}, got a damaged one ({reason})") from error
