"""What a fused copy is made of, beside its layers: modules that refuse what they were not made for, and then change
nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from operator import is_
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.graph_module import reduce_graph_module
from torch.nn.parameter import is_lazy

from ._stand_in import Recorder, alone
from ._state import counts_writes
from .layers import is_altered


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
    """A graph that was saved. ``torch.fx`` alone would make a plain ``GraphModule``, without its hooks, and read its
    code by a tracer that takes writes for something else, and other threads' calls for the code's."""
    saved[0]["_tracer_cls"] = Recorder
    with alone:
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
        made: what the steps were made of.
        above: the modules that it is in, but for a graph, which refuses by itself, and what ``torch.compile`` made of
            one, which has no mode of its own; in a tuple as the steps are.
    """

    above: tuple[nn.Module, ...] = ()
    steps: tuple[nn.Module, ...] = ()
    made: Made | None = None

    def forward(self, input: Any) -> Any:
        # Strict export finds no steps among the registered modules; the other kind puts tensors of its own into these.
        if torch.compiler.is_exporting() or not isinstance(input, Tensor) or not self._is_as_made():
            return super().forward(input)
        return self.steps[0](input)

    def _is_as_made(self) -> bool:
        """Not so for a replica of ``nn.DataParallel``, whose layers are on another device than the steps it shares."""
        return self.made is not None and self.made.modules[0] is self and self.made.is_left()

    def _apply(self, fn: Any, recurse: bool = True) -> FusedSequential:
        as_made = self._is_as_made()
        for graph in self.steps:
            graph._apply(fn, recurse)
        super()._apply(fn, recurse)
        self.made = Made.of(self) if as_made else None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"made": self._is_as_made()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of one that was saved, whose tensors lie elsewhere and count anew."""
        super().__setstate__(state)
        self.made = Made.of(self) if state["made"] else None

    def train(self, mode: bool = True) -> FusedSequential:
        if mode:  # where a module above was called, it has switched already, and what it holds before this one
            self.training = False
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
        has_mode = "training" in vars(module) and not isinstance(module, FusedGraph)
        for part in _sequentials(module) if has_mode else ():
            part.above = (*part.above, module)


def _refuse_loads(module: nn.Module) -> None:
    """A module with fused parts refuses weights before what it holds before those has loaded."""
    if next(_sequentials(module), None) is not None:
        module.register_load_state_dict_pre_hook(_refuse_loading)


def _sequentials(module: nn.Module) -> Iterator[FusedSequential]:
    """Those in a module, itself left out."""
    return (part for part in module.modules() if isinstance(part, FusedSequential) and part is not module)


@dataclass(frozen=True, eq=False)
class Made:
    """What fused steps were made of. In flat lists, as it is looked at in each call.

    Attributes:
        modules: the sequential, then every module in it.
        kinds: the classes of those in it, of a lazy one that which it will have.
        held: their parameters, buffers and children.
        tensors, places: the tensors of those, a lazy module's left out, and where each lies, another place after
            ``t.data = ...``.
        counted, writes: the tensors that count their writes, and their counts.
    """

    modules: list[nn.Module]
    kinds: list[type]
    held: list[object]
    tensors: list[Tensor]
    places: list[int]
    counted: list[Tensor]
    writes: list[int]

    @classmethod
    def of(cls, sequential: nn.Module) -> Made:
        modules = list(sequential.modules())
        held = _held(modules)
        tensors = [value for value in held if isinstance(value, Tensor) and not is_lazy(value)]
        counted = [t for t in tensors if counts_writes(t)]
        kinds = [getattr(m, "cls_to_become", None) or type(m) for m in modules[1:]]
        return cls(modules, kinds, held, tensors, _places(tensors), counted, _writes(counted))

    def is_left(self) -> bool:
        """Whether all is as it was, and each layer does what its class says, in inference."""
        now = _held(self.modules)
        if len(now) != len(self.held) or not all(map(is_, now, self.held)):
            return False
        # The compiler, which has no places, asks for other tensors' code by itself.
        is_written = not torch.compiler.is_compiling() and (
            _writes(self.counted) != self.writes or _places(self.tensors) != self.places
        )
        layers = self.modules[1:]
        return (
            not (is_written or any(m.training or is_altered(m) for m in layers)) and [*map(type, layers)] == self.kinds
        )


def _held(modules: list[nn.Module]) -> list[object]:
    return [value for m in modules for part in (m._parameters, m._buffers, m._modules) for value in part.values()]


def _writes(tensors: list[Tensor]) -> list[int]:
    return [t._version for t in tensors]


def _places(tensors: list[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _refuse_training(mode: bool) -> None:
    if mode:
        raise ValueError("mode must be False for a model fused for inference, got True; train the one it was made from")


def _refuse_loading(*_: Any) -> None:
    raise RuntimeError("a fused copy cannot load weights; load them into the model it was made from and fuse again")
