"""What surrounds a call: function transforms and tracers, which want a call in a form that they understand."""

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
    """Let torch.compile call ``function`` while it traces and keep the result, rather than trace what it does.

    ``torch.compiler.assume_constant_result`` says the same, but imports the compiler, and Triton with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_DIFFERENTIAL = ("Grad", "Jvp")


def differentiated() -> bool:
    """Whether ``torch.func`` (grad, vjp, jvp and what is made of them) or forward-mode AD differentiates the call.

    Both see through PyTorch's own operators only. Reverse mode, ``backward()``, is no part of this.
    """
    # The level is read where torch.compile sees it, which guards on it then.
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
    """Keep ``torch.jit.trace`` from recording what is done in the block."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def watched() -> bool:
    """Whether the call must pass through the dispatcher whole: a compiler, a tracer or ``torch.vmap`` looks on."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


_PLAIN = frozenset((Tensor, Parameter, type(None)))


def intercepted(*tensors: Tensor | None) -> bool:
    """Whether Python code sees what the call does: a mode of the dispatcher's, or the class of one of the tensors."""
    return torch._C._len_torch_dispatch_stack() > 0 or not _PLAIN.issuperset(map(type, tensors))


_DEFAULTS = (Tensor.__torch_function__.__func__, Parameter.__torch_function__)  # type: ignore[attr-defined]


def overrides_functions(*tensors: Any) -> bool:
    """Whether a tensor's class has a ``__torch_function__`` of its own, which may know ``F.conv2d``, and not ours."""
    if _PLAIN.issuperset(map(type, tensors)):
        return False
    handlers = [type(tensor).__torch_function__ for tensor in tensors if issubclass(type(tensor), Tensor)]
    return any(getattr(handler, "__func__", handler) not in _DEFAULTS for handler in handlers)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call on these has nothing around it: no compiler, transform, mode, autocast or forward-mode AD."""
    around = watched() or torch._C._is_any_autocast_enabled() or forward_ad._current_level >= 0
    return not (around or intercepted(*tensors))
