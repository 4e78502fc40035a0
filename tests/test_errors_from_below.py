"""Errors that PyTorch raises below an operator keep PyTorch's words and type."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rkl_kernels as rk
from rkl_kernels._operator import Operator

BY_PYTORCH = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


@pytest.mark.skipif(not BY_PYTORCH, reason="PyTorch hands its words over from 2.13 on")
@pytest.mark.parametrize("grad", [False, True])
def test_no_memory(grad):
    """The image takes no memory, but its output would take 256 TiB, more than the address space holds."""
    x = torch.zeros(1, 1, 1, 1).expand(1, 4, 1 << 22, 1 << 22)
    w, p = torch.zeros(4, 1, 1, 1, requires_grad=grad), torch.zeros(2, 4, 1, 1)

    def text(function):
        with pytest.raises(RuntimeError) as caught:
            function()
        return str(caught.value)

    theirs = text(lambda: F.relu(x))
    assert "you tried to allocate" in theirs
    for function in (
        lambda: rk.trelu(x),
        lambda: rk.depthwise_conv2d(x, w),
        lambda: rk.separable_conv2d(x, w, p),
        lambda: torch.ops.rkl.depthwise_conv2d(x, w, None, [1, 1], [0, 0], [1, 1]),
    ):
        ours = text(function)
        assert "you tried to allocate" in ours
        assert "API call failed" not in ours


def test_no_memory_on_a_gpu_has_the_type_that_programs_catch():
    words = "CUDA out of memory. Tried to allocate 2.00 GiB."

    def registered(*args):
        raise RuntimeError(words)

    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2.00 GiB"):
        Operator(registered)(torch.zeros(1))


class HookError(RuntimeError):
    """An error of the user's program."""


@pytest.mark.parametrize(
    "function",
    [
        rk.trelu,
        lambda x: rk.trelu(x * 1, inplace=True),
        lambda x: rk.depthwise_conv2d(x, torch.ones(4, 1, 3, 3)),
        lambda x: rk.separable_conv2d(x, torch.ones(4, 1, 3, 3), torch.ones(2, 4, 1, 1)),
    ],
)
def test_errors_of_a_programs_own_hooks(function):
    """They come through unchanged, and the call is made once."""
    hooked = []

    def pack(tensor):
        hooked.append(tensor)
        raise HookError("not this one") from KeyError("why")

    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, pytest.raises(HookError, match="not this one") as caught:
        function(x)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(hooked) == 1


def test_a_refusal_is_one_error():
    """The checks in Python explain better what the guard in C++ refused. The C++ error is not shown beside theirs."""
    x = torch.randn(1, 4, 5, 5)
    for function in (
        lambda: rk.depthwise_conv2d(x, torch.ones(4, 1, 7, 7)),
        lambda: rk.separable_conv2d(x, torch.ones(4, 1, 7, 7), torch.ones(2, 4, 1, 1)),
    ):
        with pytest.raises(ValueError, match="must fit into the padded image") as caught:
            function()
        assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_other_errors_stay_as_they_are():
    def registered(*args):
        raise RuntimeError("x must be so") from KeyError("why")

    with pytest.raises(RuntimeError, match="x must be so") as caught:
        Operator(registered)(torch.zeros(1))
    assert type(caught.value) is RuntimeError
    assert isinstance(caught.value.__cause__, KeyError)
