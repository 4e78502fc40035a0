"""Autocast for the convolutions, as PyTorch does it for its own: images, filters and biases in the lower type."""

from __future__ import annotations

import torch
from torch import Tensor

from ._surroundings import settled_while_compiled


@settled_while_compiled
def _has_autocast(device: str) -> bool:
    """Of meta tensors' device, say, torch will not be asked whether autocast is on."""
    return torch.amp.is_autocast_available(device)


def autocast(x: Tensor, *others: Tensor | None) -> tuple:  # type: ignore[type-arg]
    """The tensors in the active autocast type; unchanged outside autocast, and float64 always.

    A cast that autograd sees, rather than ``torch.library.register_autocast``, which knows one fixed type only.
    """
    if not torch._C._is_any_autocast_enabled():  # one question in C where there mostly is none
        return (x, *others)
    if not isinstance(x, Tensor) or x.dtype == torch.float64:
        return (x, *others)
    device = x.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, *others))
