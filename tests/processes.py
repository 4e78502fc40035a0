"""A program in two processes at once, for tests of training that is shared out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_both(script: str, *arguments: object, **environment: str) -> None:
    """Run a program of this folder twice at once, with LOCAL_RANK 0 and 1. Both must end without an error."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | {"LOCAL_RANK": str(rank), "PYTHONPATH": os.getcwd()} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
