"""``rkl`` and ``python -m rkl``: the command line, or one sentence if a package that it needs is not installed."""

from __future__ import annotations

import io
import os
import signal
import sys


def main() -> None:
    """Run :func:`rkl.cli.main`."""
    if sys.stdout is None:  # closed, as by `rkl info >&-`; the next opened file would become stdout
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        from .cli import main as run
    except ModuleNotFoundError as missing:
        sentence = f"rkl: the package {missing.name!r} must be installed, got none; pip install 'resnet-kl[train]'"
        print(sentence, file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # of a command it tells more, by itself
        print("stopped", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr: a file name may not be encodable
    try:
        try:
            run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader has stopped reading, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the last flush would fail
        raise SystemExit(128 + signal.SIGPIPE) from None


if __name__ == "__main__":
    main()
