"""Terminal input and output that the commands share: arguments, tables, one-line errors."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from .memory import shortage
from .paths import at_home

KEPT = {
    "train": "train goes on from the last whole epoch with --resume",
    "experiments": "finished runs and whole epochs are kept, and the same command goes on",
    "predict": "answers printed so far stand; run the command again for the others",
    "export": "files named so far are whole; run the command again for the others",
    "evaluate": "no file is half written; run the command again",
    "report": "no file is half written; run the command again",
}
"""What is true when a command is interrupted: what is kept, and how to go on. Other commands keep nothing."""

EXTRAS = {"onnx": "export", "onnxruntime": "export", "onnxscript": "export"}
"""The extra that installs a package, if it is not `train`."""


def show(table: Table) -> None:
    """Print a table as wide as the terminal or, if the output is no terminal, as wide as the table needs."""
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def _check_given(arguments: Sequence[str]) -> None:
    """Raise ValueError for an empty argument, such as that of an unset variable: a path would be the present folder."""
    for before, argument in pairwise(("", *arguments)):
        if not argument or re.fullmatch(r"--[\w.-]+=", argument):
            option = next((word.rstrip("=") for word in (argument, before) if word.startswith("--")), "every argument")
            raise ValueError(f"{option} must have a value, got an empty one; give one, or leave it out")


def parse(kind: type, arguments: Sequence[str], **options: Any) -> Any:
    """As ``tyro.cli``, but the framed error becomes one line, and ``~`` is expanded wherever a path begins."""
    _check_given(arguments)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=[at_home(argument) for argument in arguments], **options)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        inner = (line.strip("│╭╰╮╯─| ") for line in complaint.getvalue().splitlines()[1:])
        kept = [line for line in inner if line and not re.fullmatch(r"[-+]+|For full helptext.*|rkl \w+ --help", line)]
        raise ValueError(re.sub(r"^Error parsing [\w.]+: ", "", " ".join(kept))) from None


def complain(error: Exception | str) -> None:
    """Print an error as one line on stderr."""
    print(f"rkl: {' '.join(str(error).split())}", file=sys.stderr)


def interrupted(command: str, stop: KeyboardInterrupt) -> str:
    """What to say of a command that Ctrl-C has stopped: the exception's own words, or those of the command."""
    return f"stopped; {str(stop) or KEPT.get(command, 'run the command again')}"


def unknown_command(name: str, known: Iterable[str]) -> ValueError:
    meant = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {meant[0]!r}?" if meant else ""
    return ValueError(f"the command must be one of {', '.join(known)}, got {name!r}{hint}")


def mistake(command: str, error: Exception) -> str | None:
    """What an error says of something that the user can mend; None for any other error."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        extra = EXTRAS.get(package, "train")
        return f"the package {package!r} must be installed for this, got none; pip install 'resnet-kl[{extra}]'"
    if isinstance(error, ValueError | OSError):
        return str(error)
    short = shortage(error)
    return short and f"{command} must fit in memory, got: {short}; free some and run the command again"


def device_named(name: str | None) -> str:
    """The device to use: the one named or, by default, the GPU if there is one.

    Raises:
        ValueError: neither cpu nor a GPU that there is.
    """
    import torch

    from .training.evaluation import default_device

    kind = name or str(default_device())
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if kind != "cpu" and kind not in gpus and not (kind == "cuda" and gpus):
        raise ValueError(f"device must be cpu, or cuda where there is a GPU, got {name!r} with GPUs: {len(gpus)}")
    return kind
