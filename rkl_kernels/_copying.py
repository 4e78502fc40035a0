"""A deep copy of a model that holds nothing of the model, in functions neither."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy. What hooks make before each call (a pruned weight, say) is copied as a plain tensor. Functions that
    were set on a module, as its forward or a hook, refer to the copy's modules and tensors; ``copy.deepcopy`` leaves
    them as they are.

    Args:
        memo: gets the copies by the ``id`` of what was copied, as ``copy.deepcopy``'s does.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        memo |= {id(v): v.detach().clone() for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf}
    with torch.no_grad():  # TorchScript copies parameters by a call that autograd would record
        twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name, value in vars(module).items():
            if type(value) in (dict, OrderedDict):  # of hooks, for one: what removes them refers to the dict
                value.update({key: _of_copy(part, memo) for key, part in value.items()})
            else:
                vars(module)[name] = _of_copy(value, memo)
    return twin


def _of_copy(value: Any, memo: dict[int, Any]) -> Any:
    """What a copy refers to where the model refers to ``value``: its copy; a function or a container made anew, where
    that refers to something that was copied; or ``value`` itself."""
    if id(value) in memo:
        return memo[id(value)]
    if not _refers_to(memo, value, set()):
        return value
    memo.setdefault(id(memo), []).append(value)  # alive, as its number stands in the memo: copy.deepcopy's own way
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
    twin = memo[id(value)] = kind()  # first: it may hold itself
    if kind is list:
        twin.extend(_of_copy(part, memo) for part in value)
    else:
        twin.update((_of_copy(key, memo), _of_copy(part, memo)) for key, part in value.items())
    return twin


def _function_of_copy(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    cells = tuple(CellType() for _ in function.__closure__ or ())
    twin = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
    memo[id(function)] = twin  # first: it may refer to itself
    twin.__defaults__ = _of_copy(function.__defaults__, memo)
    twin.__kwdefaults__ = _of_copy(function.__kwdefaults__, memo)
    twin.__dict__.update(_of_copy(vars(function), memo))
    for cell, given in zip(cells, function.__closure__ or (), strict=True):
        if given != CellType():  # an empty one has no contents
            cell.cell_contents = _of_copy(given.cell_contents, memo)
    return twin


def _refers_to(memo: dict[int, Any], value: Any, seen: set[int]) -> bool:
    """Whether a value was copied, or leads to what was through functions and containers."""
    if id(value) in memo or id(value) in seen:
        return id(value) in memo
    seen.add(id(value))
    return any(_refers_to(memo, part, seen) for part in _parts(value))


def _parts(value: Any) -> Iterable[Any]:
    """What a function or a container of a class of Python's own refers to; of other objects, nothing."""
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
