"""A deep copy that shares no module or tensor with the model, not even through functions."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Container, Iterable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy. Tensors that hooks compute before each call (a pruned weight, say) are copied as plain tensors.
    Functions that were set on a module, as its forward or a hook, are copied so that they refer to the copy's modules
    and tensors. ``copy.deepcopy`` would leave such functions as they are.

    Args:
        memo: is filled with the copies, each under the ``id`` of its original, as by ``copy.deepcopy``.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        memo |= {id(v): v.detach().clone() for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf}
    with torch.no_grad():  # TorchScript copies parameters by a call that autograd would record
        twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name, value in vars(module).items():
            if type(value) in (dict, OrderedDict):  # such as hooks: their handles refer to this dict
                value.update({key: _of_copy(part, memo) for key, part in value.items()})
            else:
                vars(module)[name] = _of_copy(value, memo)
    return twin


def _of_copy(value: Any, memo: dict[int, Any]) -> Any:
    """What the copy refers to where the model refers to ``value``. This is the copy of ``value``, if it was copied; a
    new function or container, if ``value`` leads to something that was copied; else ``value`` itself."""
    if id(value) in memo:
        return memo[id(value)]
    if not refers_to(memo, value, set()):
        return value
    memo.setdefault(id(memo), []).append(value)  # as copy.deepcopy does: its id is a key while it lives
    kind = type(value)
    if kind is FunctionType:
        return _function_of_copy(value, memo)
    if kind is MethodType:
        return MethodType(*(_of_copy(part, memo) for part in _parts(value)))
    if kind is partial:
        function, args, keywords = (_of_copy(part, memo) for part in _parts(value))
        return partial(function, *args, **keywords)
    if kind in (tuple, set, frozenset):
        return kind(_of_copy(part, memo) for part in value)
    twin = memo[id(value)] = kind()  # before its parts: it may contain itself
    if kind is list:
        twin.extend(_of_copy(part, memo) for part in value)
    else:
        twin.update((_of_copy(key, memo), _of_copy(part, memo)) for key, part in value.items())
    return twin


def _function_of_copy(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    cells = tuple(CellType() for _ in function.__closure__ or ())
    twin = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
    memo[id(function)] = twin  # before its parts: it may refer to itself
    twin.__defaults__ = _of_copy(function.__defaults__, memo)
    twin.__kwdefaults__ = _of_copy(function.__kwdefaults__, memo)
    twin.__dict__.update(_of_copy(vars(function), memo))
    for cell, given in zip(cells, function.__closure__ or (), strict=True):
        if given != CellType():  # reading an empty cell is an error
            cell.cell_contents = _of_copy(given.cell_contents, memo)
    return twin


def refers_to(ids: Container[int], value: Any, seen: set[int]) -> bool:
    """Whether a value has one of the ``ids``, or leads to one that has through functions and containers."""
    if id(value) in ids or id(value) in seen:
        return id(value) in ids
    seen.add(id(value))
    return any(refers_to(ids, part, seen) for part in _parts(value))


def _parts(value: Any) -> Iterable[Any]:
    """What a function or a built-in container refers to; nothing for other objects."""
    kind = type(value)
    if kind is FunctionType:
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return (*cells, value.__defaults__, value.__kwdefaults__, vars(value))
    if kind is MethodType:
        return value.__func__, value.__self__
    if kind is partial:
        return value.func, value.args, value.keywords
    if kind in (dict, OrderedDict):
        return (*value, *value.values())
    return value if kind in (list, tuple, set, frozenset) else ()
