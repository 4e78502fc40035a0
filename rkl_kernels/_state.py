"""What a module holds, to be compared with what it holds later: a forward that is read must leave no trace."""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_CONTAINERS = (Mapping, list, tuple, set, frozenset, deque)
_NOT_LOOKED_INTO = sys.stdlib_module_names | {"torch", "numpy"}


def state(module: nn.Module) -> list[Any]:
    """Every attribute of every module, with what is in containers and in objects of the model's own, and of each tensor
    which memory it has and how often it was written."""
    seen: set[int] = set()
    return [item for value in module.modules() for item in _inside(value, seen)]


def same(a: list[Any], b: list[Any]) -> bool:
    """The same objects; numbers by value."""
    return len(a) == len(b) and all(x is y or (type(x) is int and x == y) for x, y in zip(a, b, strict=True))


def counts_writes(tensor: Tensor) -> bool:
    """Not so one that was made in inference mode, nor a lazy module's before its first call."""
    return not (is_lazy(tensor) or tensor.is_inference())


def _inside(value: Any, seen: set[int]) -> Iterator[Any]:
    yield value
    kind = type(value)  # a stand-in that was left behind does not say what it is an instance of
    if id(value) in seen:
        return
    if issubclass(kind, Tensor):
        yield from (value._version if counts_writes(value) else 0, _memory(value))
        return
    for part in _parts(value, kind):
        seen.add(id(value))
        yield from _inside(part, seen)


def _parts(value: Any, kind: type) -> Iterator[Any]:
    if issubclass(kind, Mapping):
        yield from value.keys()
        yield from value.values()
    elif issubclass(kind, _CONTAINERS):
        yield from value
    if issubclass(kind, (nn.Module, types.SimpleNamespace)) or _is_the_models_own(kind):
        for name, part in vars(value).items():
            yield name
            yield part


def _is_the_models_own(kind: type) -> bool:
    """Whether instances of a class are looked into: those that have attributes, and that no library made."""
    return kind.__dictoffset__ != 0 and kind.__module__.partition(".")[0] not in _NOT_LOOKED_INTO


def _memory(tensor: Tensor) -> int:
    """Which memory a tensor has, as a number that is another one after ``x.data = ...``; 0 where it has none."""
    if is_lazy(tensor):
        return 0
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0
