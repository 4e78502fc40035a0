"""FSDP of the layers, in two processes over Gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_sharded_layers_train_to_the_same_parameters(tmp_path: Path) -> None:
    """Sharded as a whole, by layer and by step; converted before sharding or after."""
    command = [sys.executable, str(Path(__file__).with_name("fully_sharded.py")), str(tmp_path / "meeting")]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | {"LOCAL_RANK": str(rank), "PYTHONPATH": os.getcwd()},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
