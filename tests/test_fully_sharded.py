"""FSDP of the layers, in two processes over Gloo."""

from __future__ import annotations

from pathlib import Path

from processes import run_both


def test_sharded_layers_train_to_the_same_parameters(tmp_path: Path) -> None:
    """Sharded as a whole, by layer and by step; converted before sharding or after."""
    run_both("fully_sharded.py", tmp_path / "meeting")
