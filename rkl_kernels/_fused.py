"""The modules of a fused copy, other than its layers. They refuse what they were not made for, and a refused call
changes nothing."""

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
    """The first step of a graph. It passes a tensor on, and refuses any other input and training mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, (Tensor, torch.fx.Proxy)):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}; call the model this one was made from")
        return x

    def train(self, mode: bool = True) -> Entry:
        _refuse_training(mode)
        return super().train(mode)


class FusedGraph(torch.fx.GraphModule):
    """A module whose whole forward was traced, with its chains of layers fused."""

    def train(self, mode: bool = True) -> FusedGraph:
        _refuse_training(mode)  # before any of its modules switches
        return super().train(mode)

    def __reduce__(self) -> tuple[Any, ...]:
        return _loaded, (type(self).__name__, *super().__reduce__()[1])


def _loaded(name: str, *saved: Any) -> FusedGraph:
    """Load a saved graph. ``torch.fx`` alone would make a plain ``GraphModule``, without its hooks. It would also read
    the code with a tracer that misreads writes and takes other threads' calls for the code's own."""
    saved[0]["_tracer_cls"] = Recorder
    with alone:
        graph: Any = reduce_graph_module(*saved)
    graph.__class__ = type(FusedGraph.__new__(FusedGraph))  # a class for this graph alone: recompile sets its forward
    graph.__class__.__name__ = name
    graph.recompile()
    _refuse_loads(graph)
    return graph


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` that runs fused steps when it is called as a whole. Its layers stay as they are, for code
    that calls them one by one or replaces their tensors for a call (``torch.func.functional_call``, for example). A
    slice of it has the same class, but no steps.

    Attributes:
        above: the modules that contain it. A graph is left out, since it refuses by itself; so is a module made by
            ``torch.compile``, which has no mode of its own. It is a tuple so that nothing is registered. A copy or a
            saved module leaves it out, and has it from the ``_Above`` of those that are copied or saved too.
        steps: the fused graph, or nothing. It is a tuple for the same reason.
        made: the state from which the steps were made.
    """

    above: tuple[nn.Module, ...] = ()
    steps: tuple[nn.Module, ...] = ()
    made: Made | None = None

    def forward(self, input: Any) -> Any:
        # Strict export cannot find the steps among the registered modules. Non-strict export replaces the tensors of
        # the registered modules by its own, which the steps do not have.
        if torch.compiler.is_exporting() or not isinstance(input, Tensor) or not self._is_as_made():
            return super().forward(input)
        return self.steps[0](input)

    def _is_as_made(self) -> bool:
        """Whether the layers are still what the steps were made of. They are not in a replica of ``nn.DataParallel``,
        whose layers are on another device than the steps that it shares."""
        return self.made is not None and self.made.modules[0] is self and self.made.is_left()

    def _apply(self, fn: Any, recurse: bool = True) -> FusedSequential:
        as_made = self._is_as_made()
        for graph in self.steps:
            graph._apply(fn, recurse)
        super()._apply(fn, recurse)
        self.made = Made.of(self) if as_made else None
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() | {"made": self._is_as_made()}
        state.pop("above", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a saved module. Its tensors have other addresses and start to count writes anew."""
        super().__setstate__(state)
        self.made = Made.of(self) if state["made"] else None

    def train(self, mode: bool = True) -> FusedSequential:
        if mode:  # train() of a module above has switched that module and the modules before this one: switch them back
            self.training = False
            for above in self.above:
                for module in takewhile(lambda module: module is not self, above.modules() if above.training else ()):
                    module.training = False
        _refuse_training(mode)
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        _refuse_loading()


class _Above:
    """Tells the fused parts in a module of that module. The module keeps it, as an attribute: so a part that is copied
    or saved alone does not take along what contains it, and a copied or loaded module tells its own parts."""

    def __init__(self, module: nn.Module, parts: tuple[FusedSequential, ...]) -> None:
        self.__setstate__((module, parts))

    def __getstate__(self) -> tuple[nn.Module, tuple[FusedSequential, ...]]:
        return self.module, self.parts

    def __setstate__(self, state: tuple[nn.Module, tuple[FusedSequential, ...]]) -> None:
        self.module, self.parts = state
        for part in self.parts:
            vars(part)["above"] = (*part.above, self.module)


def tie(fused: nn.Module) -> None:
    """Make a fused copy refuse training and weights before it changes, whichever of its modules is called."""
    for module in fused.modules():
        _refuse_loads(module)
        has_mode = "training" in vars(module) and not isinstance(module, FusedGraph)
        parts = tuple(_sequentials(module)) if has_mode else ()
        if parts:
            vars(module)["_rkl_above"] = _Above(module, parts)


def _refuse_loads(module: nn.Module) -> None:
    """Make a module with fused parts refuse weights before it loads them into the modules before those parts."""
    if next(_sequentials(module), None) is not None:
        module.register_load_state_dict_pre_hook(_refuse_loading)


def _sequentials(module: nn.Module) -> Iterator[FusedSequential]:
    """The ``FusedSequential`` modules inside a module, without the module itself."""
    return (part for part in module.modules() if isinstance(part, FusedSequential) and part is not module)


@dataclass(frozen=True, eq=False)
class Made:
    """The state from which fused steps were made. It is compared in every call, so it is kept in flat lists.

    Attributes:
        modules: the sequential, then every module in it.
        kinds: the class of every module in it. For a lazy module it is the class that the module will have.
        held: the parameters, buffers and children of all these modules.
        tensors, places: the tensors in ``held``, without a lazy module's, and the address of each. The address changes
            after ``t.data = ...``.
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
        """Whether nothing has changed, and every layer is in eval mode and does what its class says."""
        now = _held(self.modules)
        if len(now) != len(self.held) or not all(map(is_, now, self.held)):
            return False
        # Tensors have no addresses while torch.compile traces. It compiles anew for other tensors by itself.
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
