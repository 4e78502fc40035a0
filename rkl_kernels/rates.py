"""What a GPU moves and does in a second, by architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rates:
    """Bytes from memory, and operations on tensor cores in 16 bits and on scalar units."""

    memory: float
    tensor: float
    scalar: float


# From the data sheets (A100 80 GB, H100 SXM).
RATES = {
    80: Rates(memory=2.0e12, tensor=312e12, scalar=19.5e12),
    90: Rates(memory=3.35e12, tensor=989e12, scalar=67e12),
}


def architecture(x: Tensor) -> int:
    """Row of the table for the tensor's device: 90 (and later), 80; 90 stands in for a CPU that plays a GPU."""
    return _architecture(x.device.index) if x.device.type == "cuda" else 90


@cache
def _architecture(index: int) -> int:
    return 90 if torch.cuda.get_device_capability(index) >= (9, 0) else 80
