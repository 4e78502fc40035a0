"""A deep copy of a model that holds nothing of the model."""

from __future__ import annotations

import copy
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. What hooks make before each call (a pruned weight, say) is copied as a plain tensor. A function that
    was set as a module's forward, which ``copy.deepcopy`` takes as it is, refers to the copy's modules."""
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    with torch.no_grad():  # TorchScript copies parameters by a call that autograd would record
        twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        if "forward" in vars(module):
            vars(module)["forward"] = _of_copy(vars(module)["forward"], memo)
    return twin


def _of_copy(value: Any, memo: dict[int, Any]) -> Any:
    """What a copy refers to where the model refers to ``value``. memo: copies by the number of what was copied."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _of_copy(value.__self__, memo))
    if not isinstance(value, FunctionType) or not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
        return value
    if id(value) not in memo:
        cells = tuple(CellType() for _ in value.__closure__ or ())
        defaults = tuple(_of_copy(part, memo) for part in value.__defaults__ or ())
        twin = FunctionType(value.__code__, value.__globals__, value.__name__, defaults or None, cells or None)
        memo[id(value)] = twin  # first: a function may refer to itself
        twin.__kwdefaults__ = {
            name: _of_copy(part, memo) for name, part in (value.__kwdefaults__ or {}).items()
        } or None
        twin.__dict__.update(vars(value))
        for cell, given in zip(cells, value.__closure__ or (), strict=True):
            if given != CellType():  # an empty one has no contents
                cell.cell_contents = _of_copy(given.cell_contents, memo)
    return memo[id(value)]
