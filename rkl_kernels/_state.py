"""A snapshot of what a module holds, to be compared with a later one: a forward that is traced must change nothing."""

from __future__ import annotations

import itertools
import sys
import types
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_CONTAINERS = (Mapping, list, tuple, set, frozenset, deque)
_SIMPLE = frozenset((bool, int, float, str, type(None)))
"""Types of values that hold nothing and are no tensors."""
_EVERY_MODULES = frozenset(vars(nn.Module()))
_NOT_LOOKED_INTO = sys.stdlib_module_names | {"torch", "numpy"}


def state(module: nn.Module) -> list[Any]:
    """Every attribute of every module, including what containers and objects of the model's own classes hold. For each
    tensor also its memory and how often it was written."""
    seen: set[int] = set()
    found: list[Any] = []
    for value in module.modules():
        _note(value, seen, found)
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two snapshots hold the same objects. Integers are compared by value."""
    return len(a) == len(b) and all(x is y or (type(x) is int and x == y) for x, y in zip(a, b, strict=True))


def held_by(modules: Collection[nn.Module]) -> set[int]:
    """The ids of modules, and of what their attributes lead to that can change: containers, the model's objects."""
    seen: set[int] = set()
    held = list(modules)
    for module in modules:
        for name, value in vars(module).items():
            if name not in _EVERY_MODULES:
                _note(value, seen, held)
    kinds = (nn.Module, Mapping, list, set, deque)  # no tuple: Python shares () between all that hold it
    return {id(item) for item in held if isinstance(item, kinds) or _is_the_models_own(type(item))}


def counts_writes(tensor: Tensor) -> bool:
    """Whether a tensor counts writes. Inference tensors and a lazy module's uninitialized parameters do not."""
    return not (is_lazy(tensor) or tensor.is_inference())


def _note(value: Any, seen: set[int], found: list[Any]) -> None:
    """Append a value and what it leads to, except what the ``seen`` ones lead to. It is called a thousand times for a
    layer, mostly with names and flags."""
    found.append(value)
    kind = type(value)  # not isinstance: a stand-in that was left behind refuses to tell its class
    if kind in _SIMPLE or id(value) in seen:
        return
    if issubclass(kind, Tensor):
        found += (value._version if counts_writes(value) else 0, _memory(value))
        return
    for part in _parts(value, kind):
        seen.add(id(value))
        _note(part, seen, found)


def _parts(value: Any, kind: type) -> list[Any]:
    parts: list[Any] = []
    if issubclass(kind, Mapping):
        parts += (*value.keys(), *value.values())
    elif issubclass(kind, _CONTAINERS):
        parts += value
    if issubclass(kind, (nn.Module, types.SimpleNamespace)) or _is_the_models_own(kind):
        parts += itertools.chain.from_iterable(vars(value).items())
    return parts


def _is_the_models_own(kind: type) -> bool:
    """Whether instances of a class are looked into: they have attributes, and the class is from no known library."""
    return kind.__dictoffset__ != 0 and kind.__module__.partition(".")[0] not in _NOT_LOOKED_INTO


def _memory(tensor: Tensor) -> int:
    """A number that identifies a tensor's memory, and changes after ``x.data = ...``; 0 where it has no memory."""
    if is_lazy(tensor):
        return 0
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0
