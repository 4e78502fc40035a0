"""Traces a module's forward with stand-ins for tensors. The result is a ``torch.fx`` graph, or why there is none.

A graph is used only if it describes everything that a call in inference does. So the forward must not decide on data,
change anything or draw random numbers. It must do the same with gradients, autocast or a forced backend on and off,
and when compiled or exported.
"""

from __future__ import annotations

import builtins
import dis
import enum
import gc
import inspect
import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from types import CodeType
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ._copying import refers_to
from ._reading_modes import as_exported, cast_and_by_reference, random_state, same_random_numbers, surroundings
from ._stand_in import Answering, Recorder, StandIn, alone
from ._state import held_by, same, state
from .errors import told
from .fold import is_norm
from .layers import is_altered


def read(module: nn.Module, closed: set[nn.Module], taken: set[nn.Module]) -> torch.fx.Graph | str:
    """The graph of ``module``'s forward in inference, or one line that says why there is none.

    ``module`` must be a copy, since tracing may spoil its state: a forward that is refused has run in part.

    Args:
        module: the module, in eval mode.
        closed: its submodules that are called as they are and not traced.
        taken: is filled with the layers whose tensors the forward reads directly, and may write to. ``module`` itself
            is added if its forward reads tensors of layers outside of it.
    """
    with alone:
        why = _why_not_called_with_an_image(module) or _why_not_in_inference(module) or _why_hooks_count(module, closed)
        return why or _read(module, closed, taken)


def _read(module: nn.Module, closed: set[nn.Module], taken: set[nn.Module]) -> torch.fx.Graph | str:
    """The graph of a module that is called with one tensor, or why there is none."""
    before, random_before = state(module), random_state()
    graphs = []
    with same_random_numbers():
        for around in (torch.enable_grad, torch.inference_mode, cast_and_by_reference, as_exported):
            with around():
                graph = _traced(module, closed, taken)
            if isinstance(graph, str):
                return graph
            graphs.append(graph)
        if random_state() != random_before:
            return "its forward draws random numbers"
        if not same(state(module), before):
            return "its forward changes the module, or makes a tensor of its own"
        if any(_asks_for_none(module, closed, graphs[0], node) for node in graphs[0].nodes):
            return "its forward asks whether a module in it gives None"
        if _reads_what_is_kept(module, closed, graphs[0]):
            return "its forward reads what a module in it keeps of a call"
    if str(graphs[0]) != str(graphs[1]):
        return "its forward depends on whether gradients are recorded"
    if str(graphs[0]) != str(graphs[2]):
        return "its forward depends on autocast or the backend"
    if str(graphs[0]) != str(graphs[3]):
        return "its forward depends on whether it is compiled, traced or exported"
    if not _is_a_program(graphs[0]):
        return "its forward holds a value that a graph's code cannot name"
    return graphs[0]


def _traced(module: nn.Module, closed: set[nn.Module], taken: set[nn.Module]) -> torch.fx.Graph | str:
    """One trace of ``module``'s forward, or why there is none."""
    tracer = _Tracer(closed, taken)
    try:
        with _NoWrites(tracer):
            traced = tracer.trace(module)
    except Exception as error:  # whatever the model's code raises on a stand-in for a tensor
        return f"torch.fx cannot trace its forward: {told(error)}"
    if tracer.refused:  # the model's code caught the error
        return f"torch.fx cannot trace its forward: {tracer.refused}"
    graph = torch.fx.Graph()  # a copy that does not refer to the tracer, so that it can be saved
    graph.output(graph.graph_copy(traced, {}))
    made = tracer.made
    del tracer, traced
    if _is_any_alive(made):
        return "its forward changes the module, or keeps what it computed elsewhere"
    return graph


def _asks_for_none(module: nn.Module, closed: set[nn.Module], graph: torch.fx.Graph, doubtful: torch.fx.Node) -> bool:
    """Whether a forward takes another path if the ``doubtful`` node gives None, as code that was not traced may. The
    forward is traced again with None there. The answer is False if the graph is the same up to its end, or up to an
    error if one is raised."""
    if not _may_be_none(module, closed, doubtful):
        return False
    tracer = _Tracer(closed, set(), doubtful.name)
    with suppress(Exception), _NoWrites(tracer):  # raised by code that uses None as a tensor
        tracer.trace(module)
    made = [_told(node, "") for node in tracer.graph.nodes]
    return bool(tracer.refused) or made != [_told(node, doubtful.name) for node in graph.nodes][: len(made)]


def _told(node: torch.fx.Node, none: str) -> tuple[Any, ...]:
    """A node in a form that can be compared. The node named ``none`` becomes None in its arguments."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda arg: None if arg.name == none else arg)
    return node.op, node.target, str(args), str(kwargs)


def _may_be_none(module: nn.Module, closed: set[nn.Module], node: torch.fx.Node) -> bool:
    """Whether a node calls code that was not traced, or takes an item of its result or of attention's result."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        return called in closed or "forward" in vars(called)
    if node.target is not operator.getitem:
        return False
    whole = node.args[0]
    if not isinstance(whole, torch.fx.Node):
        return False
    attends = whole.target is F.multi_head_attention_forward or (
        whole.op == "call_module" and isinstance(module.get_submodule(str(whole.target)), nn.MultiheadAttention)
    )
    return attends or _may_be_none(module, closed, whole)


def _reads_what_is_kept(module: nn.Module, closed: set[nn.Module], graph: torch.fx.Graph) -> bool:
    """Whether a forward takes another path once the modules in it that were not traced have run. It is traced twice, so
    that values kept from an earlier call count too. Spoils the module's state."""
    if closed.isdisjoint(module.modules()):
        return False
    for _ in range(2):
        tracer = _Running(closed)
        with suppress(Exception), _NoWrites(tracer):  # an error leaves a shorter graph, which counts as another one
            tracer.trace(module)
        if _outline(tracer.graph, tracer.within) != _outline(graph, set()):
            return True
    return False


def _outline(graph: torch.fx.Graph, left_out: set[torch.fx.Node]) -> list[tuple[Any, ...]]:
    """The nodes of a graph in a form that can be compared. A node is named by its place. A parameter keeps its name,
    since its node stands where it is first used."""
    nodes = [node for node in graph.nodes if node not in left_out and node.op != "get_attr"]
    places = {node: place for place, node in enumerate(nodes)}
    told = []
    for node in nodes:
        values = torch.fx.map_arg(
            (node.args, node.kwargs), lambda arg: str(arg.target) if arg.op == "get_attr" else f"node {places.get(arg)}"
        )
        told.append((node.op, node.target, str(values)))
    return told


def _is_a_program(graph: torch.fx.Graph) -> bool:
    """Whether a graph's code is valid Python and every name in it is known. Constants are written as their ``repr``,
    which is not always a Python expression (for an enum in a dict, for example)."""
    written = graph.python_code("self")
    try:
        functions = [part for part in compile(written.src, "graph", "exec").co_consts if isinstance(part, CodeType)]
    except SyntaxError:
        return False
    known = {*written.globals, *vars(builtins)}
    return all(
        now.argval in known
        for function in functions
        for now in dis.get_instructions(function)
        if now.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a layer: it is called as it is, never traced."""
    known = isinstance(module, nn.Conv2d) or is_norm(module) or type(module).__module__.startswith("rkl_kernels.")
    return known or torch.fx.Tracer().is_leaf_module(module, "")


def has_own_call(module: nn.Module) -> bool:
    """Whether a module's class has a ``__call__`` of the model's own. A graph starts at forward and would skip it."""
    classes = type(module).__mro__
    calls = (vars(kind).get("__call__") for kind in classes[: classes.index(nn.Module)])
    return any(call and call.__module__.partition(".")[0] != "torch" for call in calls)  # torch.fx gives graphs one


_WRITTEN = (bool, int, float, complex, str)
"""Types of constants that a graph's code can write. For a subclass (``numpy.float64``) it writes the ``repr``."""


_CONTAINERS = (dict, OrderedDict, list, tuple, torch.Size)
"""Types of containers that a graph's code builds with their type unchanged."""


class _Tracer(Recorder):
    """Traces into every module that is not a layer, altered or closed."""

    kind: type[StandIn] = StandIn

    def __init__(self, closed: set[nn.Module], taken: set[nn.Module], none: str = "") -> None:
        """none: the name of a node whose value is None in this trace."""
        super().__init__()
        self.closed = closed
        self.none = none
        self.own: set[int] = set()
        self.around = surroundings()
        self.layers: dict[nn.Module, list[Any]] = {}
        self.made: list[weakref.ref[torch.fx.Proxy]] = []
        self.taken = taken
        self.refused = ""
        self.has_rebuilt = False

    def refuse(self, why: str) -> None:
        """Raise an error, and record it in case the model's code catches the error."""
        self.refused = self.refused or why
        raise RuntimeError(why)

    def trace(self, root: Any, concrete_args: Any = None) -> torch.fx.Graph:
        self.layers = {module: state(module) for module in root.modules() if self.is_leaf_module(module, "")}
        self.own = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
        return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        is_ours = threading.get_ident() == self.thread
        if is_ours and m in self.layers and not same(state(m), self.layers[m]):
            self.refuse("it changes a layer for a call, which a graph does not hold")
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.closed or is_altered(m) or is_leaf(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if issubclass(type(attr_val), Tensor) and id(attr_val) not in self.own:
            self.taken.add(self.root)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def gives_tensor(self, node: torch.fx.Node) -> bool:
        """Whether a node is known to give a tensor, because it is the forward's input or the output of a layer."""
        if node.op != "call_module":
            return node.op == "placeholder"
        layer: nn.Module = self.root.get_submodule(str(node.target))
        return layer not in self.closed and not is_altered(layer)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        if node.op == "get_attr":
            owner = self.root.get_submodule(str(node.target).rpartition(".")[0])
            if owner in self.layers:
                self.taken.add(owner)
        stand_in = self.kind(node, self)
        if node.op != "get_attr":  # fx itself keeps the proxies of parameters
            self.made.append(weakref.ref(stand_in))
        return stand_in

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        made = super().create_proxy(*args, **kwargs)
        return None if made.node.name == self.none else made

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if issubclass(kind, StandIn):
            return a.node
        named = issubclass(kind, tuple) and hasattr(kind, "_fields")
        if issubclass(kind, (dict, list, tuple)) and kind not in _CONTAINERS and not named:
            self.refuse(f"it makes a {kind.__name__}, which a graph does not hold")
        if (named or is_dataclass(kind)) and not self._is_made_of_its_fields(a):
            self.refuse(f"it makes a {kind.__name__}, which is more than its fields, and a graph makes it of those")
        base = next((base for base in _WRITTEN if issubclass(kind, base)), kind)
        if base is kind or issubclass(kind, enum.Enum):
            return super().create_arg(a)
        self.has_rebuilt = True
        return base(a)

    def _is_made_of_its_fields(self, a: Any) -> bool:
        """Whether a named tuple or a dataclass, built again from its fields, is the same and records no node."""
        kind, steps = type(a), len(self.graph.nodes)
        names = [field.name for field in fields(kind)] if is_dataclass(kind) else kind._fields
        values = {name: getattr(a, name) for name in names}
        try:
            twin = kind(**values)
        except Exception:  # whatever the model's code raises
            return False
        held, again = ({name: getattr(v, name) for name in names} | getattr(v, "__dict__", {}) for v in (a, twin))
        is_same = held.keys() == again.keys() and all(value is again[name] for name, value in held.items())
        return is_same and len(self.graph.nodes) == steps

    def to_bool(self, obj: torch.fx.Proxy) -> bool:
        self.refused = self.refused or "it decides on data"
        return super().to_bool(obj)

    def iter(self, obj: torch.fx.Proxy) -> Iterator[Any]:
        self.refused = self.refused or "it goes over data"
        return super().iter(obj)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if surroundings() != self.around:
            self.refuse("it changes gradient mode, autocast or backend for a part, which a graph does not hold")
        if args[0] == "output" and self.has_rebuilt:
            self.refuse("it returns a number or a text of a class that a graph does not hold")
        self.has_rebuilt = False
        return super().create_node(*args, **kwargs)


class _Running(_Tracer):
    """Runs the modules that are not traced on stand-ins, as far as they go, so that they store what they would store.

    Attributes:
        within: the nodes that these modules make.
    """

    kind = Answering  # nn.Module asks for the class of what is set on it

    def __init__(self, closed: set[nn.Module]) -> None:
        super().__init__(closed, set())
        self.within: set[torch.fx.Node] = set()
        self.depth = 0

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # Hooks do not run: they may write to objects outside of the model.
        if threading.get_ident() == self.thread and m in self.closed and not is_altered(m):
            self.depth += 1
            with suppress(Exception):  # it may refuse stand-ins; what it stored before stays
                forward(*args, **kwargs)
            self.depth -= 1
        return Recorder.call_module(self, m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        node = Recorder.create_node(self, *args, **kwargs)
        if self.depth:
            self.within.add(node)
        return node


class _NoWrites(TorchDispatchMode):
    """Refuses every write to an existing tensor, since a graph would not contain the write."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.tracer.refuse("it writes to a tensor, which a graph does not hold")
        return func(*args, **(kwargs or {}))


def _why_not_called_with_an_image(module: nn.Module) -> str | None:
    """Why a forward does not take exactly one tensor. A further one may be None or a flag: no stand-in fits both."""
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks are registered for all modules"
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except ValueError:
        return "its forward is a built-in, which does not say what it takes"
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) == 1 and parameters[0].kind in kinds and parameters[0].default is inspect.Parameter.empty:
        return None
    return "its forward takes something else than one tensor"


def _why_not_in_inference(module: nn.Module) -> str | None:
    """Why a module is not fully in eval mode. Its own ``train`` may keep a layer in training; a graph has no such
    method."""
    return "it keeps a module in training" if any(part.training for part in module.modules()) else None


def _why_hooks_count(module: nn.Module, closed: set[nn.Module]) -> str | None:
    """Why hooks rule a graph out. They do not run during tracing, so what they do to the values that the forward reads
    would be missing."""
    hooked = [part for part in module.modules() if is_altered(part)]
    if not hooked:
        return None
    held = held_by([part for part in module.modules() if part not in closed and part not in hooked])
    hooks = [hook for part in hooked for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
    if any(refers_to(held, hook, set()) for hook in hooks):
        return "a hook in it refers to what its forward may read"
    return None


def _is_any_alive(made: list[weakref.ref[torch.fx.Proxy]]) -> bool:
    """Whether the module, or anything else that its code can reach, still refers to a stand-in."""
    if not any(stand_in() is not None for stand_in in made):
        return False
    gc.collect()
    return any(stand_in() is not None for stand_in in made)
