"""Argument types and checks that the programs share.

argparse puts an argument's name before the messages of these types. :func:`writing` ends a program with one line where
its results cannot be written.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rkl.training.files import UnwritableError

AnyRecord = TypeVar("AnyRecord")


def count(text: str) -> int:
    """A whole number of at least 1, such as a number of threads.

    Raises:
        argparse.ArgumentTypeError: the text is not such a number.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}; give one such as 2")
    return int(text)


def positive(text: str) -> float:
    """A positive number, such as a number of seconds.

    Raises:
        argparse.ArgumentTypeError: the text is not such a number, or not a finite one.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}; give one such as 1.5")
    return value


def check_only(parser: argparse.ArgumentParser, only: str, names: Iterable[str]) -> None:
    """End the program where no model's name contains ``--only``: it would do nothing, and seem to have worked."""
    if not any(only in name for name in names):
        parser.error(f"--only must be part of a model's name, such as 'mobilenet_v2', got {only!r}")


@contextmanager
def writing(parser: argparse.ArgumentParser) -> Iterator[None]:
    """A block that writes results, or checks that they can be written. If not, the program ends with one line."""
    try:
        yield
    except UnwritableError as problem:
        parser.error(str(problem))


def write_again(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    command: str,
    load: Callable[[Path], AnyRecord],
    write: Callable[[AnyRecord, Path], None],
) -> int:
    """A program that writes the page of a record again. ``command``: what made the record."""
    parser.add_argument("record", type=Path, metavar="FILE.json", help=f"what a run of `{command}` wrote")
    path: Path = parser.parse_args(arguments).record
    try:
        record = load(path)
    except ValueError as problem:
        parser.error(f"FILE.json {problem}; `{command}` writes one")
    with writing(parser):
        write(record, path)
    return 0
