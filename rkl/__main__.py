"""``rkl`` and ``python -m rkl``: the command line, or one sentence where what it needs is not installed."""

from __future__ import annotations

import io
import os
import signal
import sys


def main() -> None:
    """Run :func:`rkl.cli.main`."""
    if sys.stdout is None:  # closed by who started this, as `rkl info >&-` does; no other file may get its number
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        from .cli import main as run
    except ModuleNotFoundError as missing:
        sentence = f"rkl: the package {missing.name!r} must be installed, got none; pip install 'resnet-kl[train]'"
        print(sentence, file=sys.stderr)
        raise SystemExit(2) from None
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a file's name may be in no encoding
    try:
        try:
            run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would complain
        raise SystemExit(128 + signal.SIGPIPE) from None


if __name__ == "__main__":
    main()
