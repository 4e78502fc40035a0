"""What the commands share with the terminal: tables, one-line complaints, arguments."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from .paths import at_home

EXTRAS = {"onnx": "export", "onnxruntime": "export", "onnxscript": "export"}
"""Which extra brings a package, where it is not `train`."""


def show(table: Table) -> None:
    """Print a table: as wide as the terminal, or as wide as it needs where the output is no terminal."""
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def parse(kind: type, arguments: Sequence[str], **options: Any) -> Any:
    """``tyro.cli``, with its framed complaint turned into one line, and with ``~`` read wherever a path begins."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=[at_home(argument) for argument in arguments], **options)
    except SystemExit as stopped:
        if not stopped.code:
            raise
        inner = (line.strip("│╭╰╮╯─ ") for line in complaint.getvalue().splitlines()[1:])
        kept = [line for line in inner if line and not line.startswith("For full helptext")]
        raise ValueError(re.sub(r"^Error parsing [\w.]+: ", "", " ".join(kept))) from None


def complain(error: Exception) -> None:
    """One line on stderr."""
    print(f"rkl: {' '.join(str(error).split())}", file=sys.stderr)


def missing_package(error: ModuleNotFoundError) -> ValueError:
    """The remedy for a package that is not there."""
    package = (error.name or "").split(".")[0]
    extra = EXTRAS.get(package, "train")
    return ValueError(f"the package {package!r} must be installed for this, got none; pip install 'resnet-kl[{extra}]'")


def device_named(name: str | None) -> str:
    """The device to use: the one asked for, or the GPU where there is one."""
    import torch

    from .training.evaluation import default_device

    kind = name or str(default_device())
    if kind.split(":")[0] not in ("cpu", "cuda") or (kind != "cpu" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda where there is a GPU, got {name!r}")
    return kind
