"""Copies a model for inference and fuses each chain of layers into one operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
import torch.fx
from torch import nn

from . import _reading, fold
from ._convert import check_module, convert, is_depthwise
from ._copying import copied
from ._fused import Entry, FusedGraph, FusedSequential, Made, tie
from .layers import SeparableConv2d, has_own_forward, is_altered, is_single


@dataclass
class Fusion:
    """What ``rk.fuse_for_inference`` did; print it.

    Attributes:
        fused: for each fused layer, the names of the modules that it replaces, in the order of their calls.
        folded: the same for each other convolution whose norm was folded into its filter. An activation after the
            norm is part of the layer too.
        left: names of the depthwise convolutions that are in no fused layer, each with the reason.

    Examples:
        >>> chain = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
        >>> rk.fuse_for_inference(nn.Sequential(*chain)).fusion_report.fused
        [('0', '1', '2', '3')]
    """

    fused: list[tuple[str, ...]] = field(default_factory=list)
    folded: list[tuple[str, ...]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        layers = sum(map(len, self.fused))
        lines = [f"chains fused: {len(self.fused)}, of {layers} layers"]
        if self.folded:
            lines.append(f"norms folded into other convolutions: {len(self.folded)}")
        return "\n".join(lines + [f"left {name}: {why}" for name, why in self.left.items()])


def fuse_for_inference(model: nn.Module) -> nn.Module:
    """Copy ``model`` for inference. Each chain of depthwise convolution, batch norm, activation, pointwise convolution,
    batch norm and activation becomes one operator, with the norms folded into the filters. An ``rk.SeparableConv2d``
    can begin a chain too. Norms after other convolutions are folded likewise. A model without depthwise convolutions
    is copied as it is.

    Equivalent to ``model.eval()`` in what a call returns, up to rounding. Only the input has a gradient. The model is
    neither changed nor called with data, and random state stays as it is. The copy is for calls alone: to train, load
    weights or change a layer, use the model and fuse again.

    ``torch.fx`` traces the copy. Some forwards cannot be traced: they decide on data, draw random numbers, change the
    module or take flags, for example. Such a module keeps its own code. In it only the layers of an ``nn.Sequential``
    are fused, for calls of that ``nn.Sequential`` as a whole. Where the model's code branches on its own attributes,
    the copy keeps the branch of now. Depthwise layers that are not fused are swapped as by ``rk.convert``.

    Args:
        model: any module, of any dtype, on any device.

    Returns:
        A copy in eval mode: a ``torch.fx.GraphModule`` where the whole model could be traced and something was fused,
        else a module of the model's own class. Its attribute ``fusion_report`` is a ``Fusion``: what was fused and
        folded, and why the rest was left.

    Raises:
        TypeError: ``model`` is no module.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).eval()
        >>> fused = rk.fuse_for_inference(model)
        >>> print(fused.fusion_report)
        chains fused: 1, of 3 layers
        >>> x = torch.randn(2, 8, 16, 16)
        >>> torch.allclose(fused(x), model(x), atol=1e-5)
        True
    """
    check_module(model)
    with torch.inference_mode(False):  # inference tensors do not count writes, which show that a forward changes them
        whole = copied(model)
        whole.eval()  # not chained: some models override train() and return nothing
        for parameter in whole.parameters():
            parameter.requires_grad = False  # TorchScript's modules have no requires_grad_()
        convert(whole)
        fuser = _Fuser(whole)
        fused = fuser.fuse()
    vars(fused)["fusion_report"] = fuser.report
    if isinstance(fused, torch.fx.GraphModule):
        fused.meta["_user_preserved_attributes"] = {"fusion_report": fuser.report}  # kept in deep copies
    return fused


class _Fuser:
    """Fuses one copy of a model.

    Attributes:
        closed: modules that keep their own code, with the reason.
        taken: layers whose tensors the model's code reads directly, and may write to. They are not fused.
    """

    def __init__(self, whole: nn.Module) -> None:
        self.whole = whole
        self.names = {module: name for name, module in whole.named_modules()}
        self.report = Fusion()
        self.closed: dict[nn.Module, str] = {}
        self.taken: set[nn.Module] = set()
        self.graphs: dict[nn.Module, torch.fx.Graph] = {}

    def fuse(self) -> nn.Module:
        depthwise = [m for m in self.names if isinstance(m, nn.Conv2d) and is_depthwise(m)]
        if not depthwise:
            return self.whole
        self._read(self.whole, set())
        if self.whole not in self.graphs:  # a layer, or a container without a forward
            self.closed.setdefault(self.whole, "it is called as it is")
        elif _reading.has_own_call(self.whole):  # a submodule's own __call__ is traced with its caller
            self.closed.setdefault(self.whole, "its class has a __call__ of its own")
        fused = self.whole
        if self.whole not in self.closed:
            fused = self._fused(self.whole) or self.whole
        for module in self.closed:
            for sequential in self._sequentials(module):
                self._swap(sequential)
        tie(fused)
        done = {name for chain in self.report.fused for name in chain}
        single = {m.depthwise for m in self.names if isinstance(m, SeparableConv2d) and is_single(m)}
        for module in depthwise:
            if self.names[module] not in done and module not in single:
                self.report.left.setdefault(self.names[module], self._why_not_read(self.names[module]))
        return fused

    def _read(self, module: nn.Module, seen: set[nn.Module]) -> None:
        """Trace every module, children first: a child that cannot be traced is closed when its parent is traced."""
        if module in seen:
            return
        seen.add(module)
        for child in module.children():
            self._read(child, seen)
        if _reading.is_leaf(module):
            return
        memo: dict[int, Any] = {}
        probe = copied(module, memo)
        taken: set[nn.Module] = set()
        graph = _reading.read(probe, {memo[id(m)] for m in self.closed if id(m) in memo}, taken)
        if probe in taken and isinstance(graph, str):  # it may write to any module that it refers to
            taken.update(memo[id(m)] for m in self.names.keys() - set(module.modules()) if id(m) in memo)
        self.taken.update(m for m in self.names if memo.get(id(m)) in taken - {probe})
        if isinstance(graph, str):
            self.closed[module] = graph
            return
        self.graphs[module] = graph
        if is_altered(module):
            self.closed[module] = "it has hooks, or a forward of its own"

    def _sequentials(self, module: nn.Module) -> Iterator[nn.Module]:
        """The outermost ``nn.Sequential`` modules in a module that keeps its own code, or the module itself."""
        if type(module) is nn.Sequential and module in self.graphs and not has_own_forward(module):
            yield module
        elif type(module) is not FusedSequential:
            for child in module.children():
                yield from self._sequentials(child)

    def _swap(self, sequential: nn.Module) -> None:
        steps = self._fused(sequential)
        if steps is not None:
            sequential.__class__ = FusedSequential
            vars(sequential).update(steps=(steps,), made=Made.of(sequential))

    def _fused(self, module: nn.Module) -> FusedGraph | None:
        """A graph module with the module's chains fused and its other layers shared; None where it has no chain."""
        graph = self.graphs[module]
        parts: dict[str, Any] = {}
        for node in list(graph.nodes):
            if node.op == "call_module" and not node._erased:
                self._fuse_from(module, node, parts)
        if not parts:
            return None
        for node in graph.nodes:
            if node.op == "placeholder":
                _insert_entry(graph, node, parts)
            elif node.op in ("call_module", "get_attr") and node.target not in parts:
                parts[node.target] = _attribute(module, node.target)
        return FusedGraph(parts, graph, type(module).__name__).eval()

    def _fuse_from(self, module: nn.Module, node: torch.fx.Node, parts: dict[str, Any]) -> None:
        """Replace ``node`` and the nodes after it by a fused layer, if ``node`` begins a chain."""
        nodes = _chain(node)
        called = (module.get_submodule(str(n.target)) for n in nodes)
        modules = list(takewhile(lambda m: self.taken.isdisjoint(m.modules()), called))
        first = modules[0] if modules else None
        if not isinstance(first, nn.Conv2d | SeparableConv2d):
            return
        depthwise = isinstance(first, SeparableConv2d) or is_depthwise(first)
        fused = fold.fuse(modules) if depthwise else fold.fold_norm(modules)
        if fused is None:
            if depthwise and isinstance(first, nn.Conv2d):
                self.report.left[self.names[first]] = fold.why_not_first(first) or _why_not_fused(node, modules)
            return
        nodes = nodes[: fused.modules]
        names = tuple(self.names[m] for m in modules[: fused.modules])
        listed = self.report.fused if depthwise else self.report.folded
        if names not in listed:
            listed.append(names)
        target = f"{str(node.target).replace('.', '_')}_fused"
        while target in parts or hasattr(module, target):
            target += "_"
        parts[target] = fused.layer
        with node.graph.inserting_before(node):
            served = node.graph.call_module(target, node.args)
        nodes[-1].replace_all_uses_with(served)
        for done in reversed(nodes):
            node.graph.erase_node(done)

    def _why_not_read(self, name: str) -> str:
        """Why a depthwise convolution was not traced: the reason why the nearest module around it is closed."""
        if not name:
            return "it is the whole model"
        if self.whole.get_submodule(name) in self.taken:
            return "the model's code takes its tensors by themselves"
        while name:
            name = name.rpartition(".")[0]
            why = self.closed.get(self.whole.get_submodule(name))
            if why:
                return f"in {name or 'the model'}: {why}"
        return "the model's forward does not call it as a layer"


def _chain(node: torch.fx.Node) -> list[torch.fx.Node]:
    """``node`` and the module calls after it. Each takes one argument: the last call's output, which it alone reads."""
    nodes = [node]
    if len(node.args) != 1 or node.kwargs:
        return nodes[:0]
    while len(nodes[-1].users) == 1:
        (reader,) = nodes[-1].users
        if reader.op != "call_module" or reader.args != (nodes[-1],) or reader.kwargs:
            break
        nodes.append(reader)
    return nodes


def _why_not_fused(node: torch.fx.Node, modules: list[nn.Module]) -> str:
    if len(node.users) != 1:
        return f"its output is read {len(node.users)} times"
    if len(modules) == 1:
        return "its output goes to something else than a layer"
    return f"no norm with statistics and no pointwise convolution follows it, but {type(modules[1]).__name__}"


def _insert_entry(graph: torch.fx.Graph, placeholder: torch.fx.Node, parts: dict[str, Any]) -> None:
    parts["entry_fused"] = Entry()
    with graph.inserting_after(placeholder):
        entry = graph.call_module("entry_fused", (placeholder,))
    placeholder.replace_all_uses_with(entry, delete_user_cb=lambda user: user is not entry)


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for name in target.split("."):
        value = getattr(value, name)
    return value
