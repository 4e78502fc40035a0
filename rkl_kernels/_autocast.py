"""Autocast for the convolutions, as PyTorch does it for its own: images, filters and biases in the lower type."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from ._surroundings import settled_while_compiled

CONVOLUTIONS = ("depthwise_conv2d", "separable_conv2d")
"""The operators that are cast."""

KEYS = ("AutocastCPU", "AutocastCUDA")
"""The dispatcher's keys of autocast on the devices that have kernels."""

_KEYSET = reduce(or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in KEYS))


@settled_while_compiled
def _has_autocast(device: str) -> bool:
    """Of meta tensors' device, say, torch will not be asked whether autocast is on."""
    return torch.amp.is_autocast_available(device)


def autocast(x: Tensor, *others: Any) -> tuple:  # type: ignore[type-arg]
    """The tensors in the active autocast type; unchanged outside autocast, and float64 always."""
    if not torch._C._is_any_autocast_enabled():  # one question in C where there mostly is none
        return (x, *others)
    if not isinstance(x, Tensor):
        return (x, *others)
    device = x.device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if _is_cast(t) else t for t in (x, *others))


def _is_cast(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64


def below_autocast() -> Any:
    """A block in which the operators take what they are given as it is. Autocast counts as off in it."""
    return torch._C._ExcludeDispatchKeyGuard(_KEYSET)


def register(library: torch.library.Library, name: str, registered: Any) -> None:
    """Cast what an operator is given, for exported and traced graphs, which call it with no Python before it.

    ``torch.library.register_autocast`` would cast to one type, fixed when it is called.
    """

    def cast(*args: Any) -> Any:
        cast_args = autocast(*args)
        with below_autocast():
            return registered(*cast_args)

    for key in KEYS:
        library.impl(name, cast, key)
