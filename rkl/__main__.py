"""``rkl`` and ``python -m rkl``: the command line, or one sentence where what it needs is not installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run :func:`rkl.cli.main`."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as missing:
        sentence = f"rkl: the package {missing.name!r} must be installed, got none; pip install 'resnet-kl[train]'"
        print(sentence, file=sys.stderr)
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
