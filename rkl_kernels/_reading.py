"""What a module's forward does, read once with stand-ins for tensors: a ``torch.fx`` graph, or why there is none.

A graph is taken only where it is the whole truth about a call in inference: the forward decides nothing on data, leaves
no trace in the module, draws no random numbers, and does the same with gradients on and off.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn

from ._backends import forced
from .fold import is_norm
from .layers import is_altered


def read(module: nn.Module, closed: set[nn.Module]) -> torch.fx.Graph | str:
    """The graph of ``module``'s forward in inference, or one line that says why there is none.

    ``module`` must be one whose state may be spoilt, a copy: a forward that is refused has been run in part.

    Args:
        module: in inference mode.
        closed: modules below it that are called as they are, not looked into.
    """
    why = _why_not_called_with_an_image(module)
    if why:
        return why
    before, random_before = _state(module), _random_state()
    graphs = []
    with _same_random_numbers():
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                tracer = _Tracer(closed)
                try:
                    graphs.append(tracer.trace(module))
                except Exception as error:  # whatever the model's code raises on a stand-in for a tensor
                    lines = str(error).splitlines() or [""]
                    return f"torch.fx cannot trace its forward: {type(error).__name__}: {lines[0]}"
        if _random_state() != random_before:
            return "its forward draws random numbers"
    if not _same(_state(module), before):
        return "its forward changes the module, or makes a tensor of its own"
    if str(graphs[0]) != str(graphs[1]):
        return "its forward depends on whether gradients are recorded"
    graph = torch.fx.Graph()  # one that does not refer to the tracer, so that it can be saved
    graph.output(graph.graph_copy(graphs[0], {}))
    return graph


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a layer: called as it is, never looked into."""
    known = isinstance(module, nn.Conv2d) or is_norm(module) or type(module).__module__.startswith("rkl_kernels.")
    return known or torch.fx.Tracer().is_leaf_module(module, "")


class _StandIn(torch.fx.Proxy):
    """Stands for what a call makes. Code that asks whether it is a tensor would get the wrong answer, and gets none."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        raise RuntimeError("it asks for the type of a value")

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(f"a tensor has no {name}")
        return super().__getattr__(name)


class _Tracer(torch.fx.Tracer):
    """Looks into every module that is not PyTorch's own, altered, or closed."""

    def __init__(self, closed: set[nn.Module]) -> None:
        super().__init__()
        self.closed = closed
        self.surroundings = _surroundings()
        self.layers: dict[nn.Module, list[Any]] = {}

    def trace(self, root: Any, concrete_args: Any = None) -> torch.fx.Graph:
        self.layers = {module: _state(module) for module in root.modules() if self.is_leaf_module(module, "")}
        return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m in self.layers and not _same(_state(m), self.layers[m]):
            raise RuntimeError("it changes a layer for a call, which a graph does not hold")
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.closed or is_altered(m) or is_leaf(m)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _StandIn(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _StandIn else super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if _surroundings() != self.surroundings:
            raise RuntimeError("it changes gradient mode, autocast or backend for a part, which a graph does not hold")
        return super().create_node(*args, **kwargs)


def _why_not_called_with_an_image(module: nn.Module) -> str | None:
    """A further argument may be None or a flag, and a stand-in for one would decide for the other."""
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks are registered for all modules"
    parameters = list(inspect.signature(module.forward).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) == 1 and parameters[0].kind in kinds and parameters[0].default is inspect.Parameter.empty:
        return None
    return "its forward takes something else than one tensor"


def _surroundings() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    casts = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), casts, forced()


def _random_state() -> tuple[Any, ...]:
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002  the model's code may draw from it
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(keys).tobytes(), position


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Whatever is drawn in the block, the caller's next numbers are those that would have come without it."""
    state, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)  # noqa: NPY002


def _state(module: nn.Module) -> list[Any]:
    """Every attribute of every module, with what is in containers and how often a tensor was written."""
    return [item for m in module.modules() for name, value in vars(m).items() for item in (name, *_inside(value))]


def _inside(value: Any) -> Iterator[Any]:
    kind = type(value)  # a stand-in that was left behind does not say what it is an instance of
    parts: Any = value.values() if issubclass(kind, Mapping) else value
    for part in (value, *(parts if issubclass(kind, (Mapping, list, tuple, set)) else ())):
        yield part
        if issubclass(type(part), Tensor):
            yield part._version


def _same(a: list[Any], b: list[Any]) -> bool:
    """The same objects; counts of writes by value."""
    return len(a) == len(b) and all(x is y or (type(x) is int and x == y) for x, y in zip(a, b, strict=True))
