"""How an operator is called, with as little overhead as its surroundings allow.

The dispatcher's path through an operator's registered gradient costs 7 us a call, whether or not a gradient is wanted
(depthwise, 1 x 8 x 4 x 4, one thread of an AMD EPYC). ``torch.compile``, ``torch.export``, ``torch.vmap`` and
``torch.jit.trace`` need that path. A plain call does not. Without gradients it goes straight below autograd; with
gradients it goes through one ``torch.autograd.Function`` made of the same formulas. The depthwise convolution has its
gradient in C++.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ._autocast import below_autocast
from ._surroundings import intercepted, watched

Formula = tuple[Callable[..., None], Callable[..., Any]]
"""``setup(ctx, inputs, output)`` and ``backward(ctx, *gradients)``, as for ``torch.library.register_autograd``."""

below_autograd = torch._C._AutoDispatchBelowAutograd

convolution = torch.ops.aten.convolution_overrideable.default
"""PyTorch's extension point for a device's own convolutions. The kernels of ``torch.ops.rkl`` serve its depthwise
calls."""


class Operator:
    """One operator of one backend.

    Attributes:
        registered: the operator as the dispatcher knows it.
        function: the operator with its gradient, for plain calls; None where it has no gradient.
    """

    def __init__(self, registered: Any) -> None:
        self.registered = registered
        self.function: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any) -> Any:
        """A call from a function of this package or a gradient, whose tensors autocast has already cast."""
        if watched():
            return self.registered(*args)
        try:
            with below_autocast() if torch._C._is_any_autocast_enabled() else nullcontext():
                return self.plain(*args)
        except RuntimeError as error:
            reword(error)
            raise

    def plain(self, *args: Any) -> Any:
        """A call outside compilers and function transforms."""
        if self.function is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if any(map(_is_many, args)):  # their wrapper would hide the Function's node in the graph
                return self.registered(*args)
            return self.function.apply(*args)
        with below_autograd():
            return self.registered(*args)

    def differentiate(self, formula: Formula, in_place: bool = False) -> None:
        """Give plain calls a gradient. ``in_place``: the operator overwrites its first tensor, its only result."""
        registered, (setup, backward) = self.registered, formula
        below = (
            torch._C._AutoDispatchBelowADInplaceOrView if in_place else below_autograd
        )  # mark_dirty counts the write

        def forward(ctx: Any, *inputs: Any) -> Any:
            if in_place:
                _refuse_unfollowed(inputs[0])
            with below():
                output = registered(*inputs)
            if in_place:
                output = inputs[0]
                ctx.mark_dirty(output)
            setup(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.function = type(registered.name(), (torch.autograd.Function,), methods)


class DepthwiseOperator(Operator):
    """The depthwise convolution of ``torch.ops.rkl``. A plain call uses PyTorch's extension point for a device's own
    convolutions, whose gradient is in C++. benchmarks/NOTES.md has the cost of a gradient in Python in a network, with
    the program that measured it.
    """

    def __call__(self, *args: Any) -> Any:
        # Dispatch modes and tensor subclasses know our operators, not the extension point. watched() comes first: a
        # compiler that traces this line cannot trace intercepted().
        if watched() or intercepted(*args[:3]):
            return self.registered(*args)
        return super().__call__(*args)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any) -> Any:
        return convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), x.shape[1])


def reword(error: RuntimeError, rules: Callable[[], Any] = lambda: None) -> None:
    """Raise a better error than the RuntimeError that an extension raises for everything. If ``rules`` refuse the
    arguments, raise their error. If the GPU is out of memory, raise ``torch.OutOfMemoryError``, which programs catch.
    Else return: the caller raises the error as it is."""
    try:
        rules()
    except Exception as refusal:
        raise refusal from None
    if str(error).startswith("CUDA out of memory"):
        raise torch.OutOfMemoryError(*error.args) from None


def _is_many(value: Any) -> bool:
    """Whether ``autograd.grad(is_grads_batched=True)`` has put many gradients into one tensor. It uses an old vmap,
    which does not count as a function transform."""
    return isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)


def _refuse_unfollowed(x: Tensor) -> None:
    """Refuse, before any write, to overwrite a leaf or a view that autograd cannot follow, as PyTorch does."""
    base = x._base
    if base is not None:
        made = torch._C._autograd._get_creation_meta(x)
        if made != torch._C._autograd.CreationMeta.DEFAULT:
            how = {"MULTI_OUTPUT_NODE": "by a function that returns several", "NO_GRAD_MODE": "in no_grad mode"}
            raise RuntimeError(
                "x must not be a view that autograd cannot follow, one made "
                f"{how.get(made.name, 'in inference mode or by a custom function')}; clone it first"
            )
    if x.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        of = "a leaf" if x.is_leaf else "a view of a leaf"
        raise RuntimeError(f"{of} Variable that requires grad is being used in an in-place operation.")
