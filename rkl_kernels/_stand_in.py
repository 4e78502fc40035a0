"""The stand-in for a tensor while a forward is traced. It records every operation on itself, and refuses a question
whose answer a graph could not hold."""

from __future__ import annotations

import dis
import operator
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

_MAY_BE_NONE = {"grad", "grad_fn", "_grad", "_base", "_backward_hooks", "_post_accumulate_grad_hooks"}
"""Attributes of a tensor that code compares with None. A stand-in's attribute would never be None."""


alone = threading.RLock()
"""One thread traces at a time. torch.fx replaces methods of ``nn.Module`` while it traces, and restores them correctly
only if no other thread does the same."""


class Recorded(torch.fx.Proxy):
    """Records writes as writes. torch.fx alone turns ``x += y`` into ``x = x + y``, and refuses ``x[0] = y``."""

    def __getattr__(self, name: str) -> Any:
        return _RecordedAttribute(self, name)

    def __setitem__(self, place: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, place, value), {})


class _RecordedAttribute(Recorded, torch.fx.proxy.Attribute):
    """An attribute: what a call of it makes, or the value itself."""


class Recorder(torch.fx.Tracer):
    """Records what one thread does. Writes stay writes, and an ``OrderedDict`` stays one."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:  # torch.fx intercepts calls in every thread
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return Recorded(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # fx would make it a dict
            return self.create_node("call_function", OrderedDict, ([self.create_arg(pair) for pair in a.items()],), {})
        return super().create_arg(a)


class StandIn(Recorded):
    """Stands for what a call makes. Code that asks for its type, its length or what cannot be known gets no answer, but
    an error, which its tracer notes for when the code catches it."""

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        self.tracer.refuse("it asks for the type of a value")
        raise AssertionError

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        return torch.fx.Proxy.__torch_function__(*args, **kwargs)  # not cls: fx compares classes with it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _MAY_BE_NONE:
            self.tracer.refuse(f"it asks for the {name} of a value")
        if not hasattr(Tensor, name):
            if not self.tracer.gives_tensor(self.node):
                self.tracer.refuse(f"it asks for the {name} of a value")
            raise AttributeError(f"a tensor has no {name}")
        return _Attribute(self, name)

    def __iter__(self) -> Iterator[Any]:
        """The items of ``a, b = x``, which is detected as fx does. (The method of fx leaves frames that refer to x.)"""
        caller = sys._getframe(1)
        for now in dis.get_instructions(caller.f_code):
            if now.offset == caller.f_lasti and now.opname == "UNPACK_SEQUENCE":
                return iter([operator.getitem(self, i) for i in range(now.argval)])
        return iter(self.tracer.iter(self))

    def __hash__(self) -> int:
        self.tracer.refuse("it looks a value up")  # a set or a dict would compare by identity
        raise AssertionError

    def __str__(self) -> str:
        self.tracer.refused = self.tracer.refused or "it makes a text of a value"
        return repr(self)  # no error: an error message may contain a value

    def __format__(self, how: str) -> str:
        return repr(self)  # no refusal: models format messages for assertions that hold

    def __len__(self) -> int:
        self.tracer.refused = self.tracer.refused or "it asks for a length"
        return super().__len__()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):  # attributes that fx sets
            self.tracer.refuse(f"it sets the {name} of a value")
        super().__setattr__(name, value)


class Answering(StandIn):
    """A stand-in that tells its class, so that a module can keep it as an attribute."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self)


class _Attribute(StandIn, torch.fx.proxy.Attribute):
    """An attribute of a stand-in. The code may call it as a method or use it as a value."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Attribute(self, name)


def _written(name: str) -> Any:
    """The method for ``x += y``, recorded as a write to x, which others may hold. fx would record ``x = x + y``."""
    function = getattr(operator, f"i{name}")

    def method(self: Recorded, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    setattr(Recorded, f"__i{_name}__", _written(_name))
