"""Autocast for the convolutions: images, filters and biases are cast to the lower type, as for ``F.conv2d``."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from ._surroundings import settled_while_compiled

CONVOLUTIONS = ("depthwise_conv2d", "separable_conv2d")
"""The operators whose arguments autocast casts."""

KEYS = ("AutocastCPU", "AutocastCUDA")
"""The dispatcher's autocast keys, for the devices that have kernels."""

_KEYSET = reduce(or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in KEYS))


@settled_while_compiled
def _has_autocast(device: str) -> bool:
    """Whether a device type has autocast. ``torch.is_autocast_enabled`` raises where it has none ("meta", say)."""
    return torch.amp.is_autocast_available(device)


def autocast(x: Tensor, *others: Any) -> tuple:  # type: ignore[type-arg]
    """The tensors cast to the active autocast type. Outside autocast they stay as they are; float64 always does."""
    if not torch._C._is_any_autocast_enabled():  # the common case costs one call into C
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
    """A context manager in which autocast is off: the operators do not cast their arguments."""
    return torch._C._ExcludeDispatchKeyGuard(_KEYSET)


def register(library: torch.library.Library, name: str, registered: Any) -> None:
    """Register a kernel that casts an operator's arguments. Exported and traced graphs call the operator directly.

    ``torch.library.register_autocast`` would not do: the type that it casts to is fixed when it is called.
    """

    def cast(*args: Any) -> Any:
        cast_args = autocast(*args)
        with below_autocast():
            return registered(*cast_args)

    for key in KEYS:
        library.impl(name, cast, key)
