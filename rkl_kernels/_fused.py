"""What a fused copy is made of, beside its layers: modules that refuse what they were not made for, and then change
nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.graph_module import reduce_graph_module

from .layers import is_altered

_Made = tuple[nn.Module, tuple[tuple[Tensor | None, tuple[int, int]], ...]]
"""A layer with its tensors, each with how often it was written and where it lies."""


class Entry(nn.Module):
    """Stands where a graph begins: passes tensors on and refuses what the graph was not read for."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, (Tensor, torch.fx.Proxy)):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}; call the model this one was made from")
        return x

    def train(self, mode: bool = True) -> Entry:
        _refuse_training(mode)
        return super().train(mode)


class FusedGraph(torch.fx.GraphModule):
    """A model that was read as a whole."""

    def train(self, mode: bool = True) -> FusedGraph:
        _refuse_training(mode)  # before any module of it has switched
        return super().train(mode)

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, (type(self).__name__, *super().__reduce__()[1])


def _loaded(name: str, *saved: Any) -> FusedGraph:
    """A graph that was saved, which ``torch.fx`` alone would make a plain ``GraphModule``, without its hooks."""
    graph: Any = reduce_graph_module(*saved)
    graph.__class__ = type(FusedGraph.__new__(FusedGraph))  # a class of this graph alone, which takes its forward
    graph.__class__.__name__ = name
    graph.recompile()
    _refuse_loads(graph)
    return graph


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` whose call as a whole runs fused steps. Its layers stay as they are, for whoever takes them
    one by one, or changes them for a call (``torch.func.functional_call``, say); the steps are in a tuple, which
    registers nothing. A slice of it is made of its class, without steps.

    Attributes:
        made_of: its layers and their tensors when the steps were made.
        above: the modules that it is in, but for a graph, which refuses by itself; in a tuple as the steps are.
    """

    above: tuple[nn.Module, ...] = ()
    steps: tuple[nn.Module, ...] = ()
    made_of: tuple[_Made, ...] = ()

    def forward(self, input: Any) -> Any:
        as_made = self.steps and isinstance(input, Tensor) and all(map(_is_as_made, self.made_of))
        return self.steps[0](input) if as_made else super().forward(input)

    def _apply(self, fn: Any, recurse: bool = True) -> FusedSequential:
        for graph in self.steps:
            graph._apply(fn, recurse)
        super()._apply(fn, recurse)
        self.made_of = made_of(self)
        return self

    def train(self, mode: bool = True) -> FusedSequential:
        if mode:  # where a module above was called, it has switched already, and what it holds before this one
            for above in self.above:
                for module in takewhile(lambda module: module is not self, above.modules() if above.training else ()):
                    module.training = False
        _refuse_training(mode)
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        _refuse_loading()


def tie(fused: nn.Module) -> None:
    """Let every part that can only be fused again know what it is in: whatever is called refuses before it changes."""
    for module in fused.modules():
        _refuse_loads(module)
        for part in _sequentials(module) if not isinstance(module, FusedGraph) else ():
            part.above = (*part.above, module)


def _refuse_loads(module: nn.Module) -> None:
    """A module with fused parts refuses weights before what it holds before those has loaded."""
    if next(_sequentials(module), None) is not None:
        module.register_load_state_dict_pre_hook(_refuse_loading)


def _sequentials(module: nn.Module) -> Iterator[FusedSequential]:
    """Those in a module, itself left out."""
    return (part for part in module.modules() if isinstance(part, FusedSequential) and part is not module)


def made_of(sequential: nn.Module) -> tuple[_Made, ...]:
    layers = [layer for layer in sequential.modules() if layer is not sequential]
    return tuple((layer, tuple((t, _writes(t)) for t in _tensors(layer))) for layer in layers)


def _is_as_made(made: _Made) -> bool:
    layer, tensors = made
    now = _tensors(layer)
    same = len(tensors) == len(now) and all(t is there for t, (there, _) in zip(now, tensors, strict=True))
    if not torch.compiler.is_compiling():  # which asks for other tensors' code by itself
        same = same and all(_writes(t) == writes for t, writes in tensors)
    return same and not layer.training and not is_altered(layer)


def _tensors(layer: nn.Module) -> tuple[Tensor | None, ...]:
    return *layer._parameters.values(), *layer._buffers.values()


def _writes(t: Tensor | None) -> tuple[int, int]:
    """How often a tensor was written, and which memory it has: another one after ``t.data = ...``."""
    return (0, 0) if t is None else (0 if t.is_inference() else t._version, t.data_ptr())


def _refuse_training(mode: bool) -> None:
    if mode:
        raise ValueError("mode must be False for a model fused for inference, got True; train the one it was made from")


def _refuse_loading(*_: Any) -> None:
    raise RuntimeError("a fused copy cannot load weights; load them into the model it was made from and fuse again")
