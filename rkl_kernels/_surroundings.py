"""What surrounds a call: compilers, function transforms and tracers, which need a call in a form they understand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

F = TypeVar("F", bound=Callable[..., Any])


def settled_while_compiled(function: F) -> F:
    """Let torch.compile call ``function`` while it traces and keep the result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports the compiler, and Triton with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_DIFFERENTIAL = ("Grad", "Jvp")


def differentiated() -> bool:
    """Whether ``torch.func`` (grad, vjp, jvp and functions built on them) or forward-mode AD differentiates the call.

    Both can differentiate PyTorch's own operators only. Reverse mode, ``backward()``, does not count here.
    """
    # The level is read in code that torch.compile traces, so that it guards on the level.
    return forward_ad._current_level >= 0 or _is_transformed()


@settled_while_compiled  # torch.compile guards on the stack itself
def _is_transformed() -> bool:
    if not torch._C._are_functorch_transforms_active():
        return False
    return any(level.key().name in _DIFFERENTIAL for level in torch._C._functorch.get_interpreter_stack() or ())


def recorded() -> bool:
    """Whether ``torch.jit.trace`` records the call."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]


@contextmanager
def unrecorded() -> Iterator[None]:
    """Keep ``torch.jit.trace`` from recording the operations in the block."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def transformed() -> bool:
    """Whether a transform of ``torch.func``, ``torch.vmap`` for example, is active."""
    return torch._C._are_functorch_transforms_active()


def watched() -> bool:
    """Whether a compiler, a tracer or ``torch.vmap`` is active: the call must then be one call of the dispatcher."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


_PLAIN = frozenset((Tensor, Parameter, type(None)))


def intercepted(*tensors: Tensor | None) -> bool:
    """Whether Python code intercepts the call: a dispatch mode, or the class of one of the tensors."""
    return torch._C._len_torch_dispatch_stack() > 0 or not _PLAIN.issuperset(map(type, tensors))


_DEFAULTS = (Tensor.__torch_function__.__func__, Parameter.__torch_function__)  # type: ignore[attr-defined]


def overrides_functions(*tensors: Any) -> bool:
    """Whether a tensor's class has its own ``__torch_function__``: it may know ``F.conv2d``, but not our functions."""
    if _PLAIN.issuperset(map(type, tensors)):
        return False
    handlers = [type(tensor).__torch_function__ for tensor in tensors if issubclass(type(tensor), Tensor)]
    return any(getattr(handler, "__func__", handler) not in _DEFAULTS for handler in handlers)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call on these is plain: no compiler, transform, mode, tensor subclass, autocast or forward-mode AD."""
    around = watched() or torch._C._is_any_autocast_enabled() or forward_ad._current_level >= 0
    return not (around or intercepted(*tensors))
