"""The operators' gradient formulas (rkl_kernels/ops.py) in float64, where a wrong formula cannot hide in rounding.

The kernels do not serve float64. So the tests define the operators once more, in their own namespace, with plain
PyTorch behind them. This checks the autograd and shape rules that all backends share.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from rkl_kernels import _checks, ops, reference


def _name(activation: int) -> str | None:
    return _checks.ACTIVATIONS[activation - 1] if activation else None


def _convolution_backward(grad, x, weight, stride, padding, dilation, groups, mask):
    """PyTorch's own convolution gradients in the layouts of the fake kernels. Unwanted ones are empty."""
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, mask
    )
    formats = suggest_memory_format(x), suggest_memory_format(weight), torch.contiguous_format
    return tuple(
        g.contiguous(memory_format=f) if m else x.new_empty(0) for g, f, m in zip(grads, formats, mask, strict=True)
    )


def _activation_backward(grad: Tensor, x: Tensor, activation: int) -> Tensor:
    name, y = _name(activation), reference.activate(x, _name(activation))
    if name == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    return grad * _derivative_from_output(y, name)


def _derivative_from_output(y: Tensor, name: str | None) -> Tensor:
    return {
        None: torch.ones_like(y),
        "relu": (y > 0).to(y.dtype),
        "relu6": ((y > 0) & (y < 6)).to(y.dtype),
        "trelu": torch.where(y > 0, 1, 1 - y * y),
    }[name]


def _trelu_(x: Tensor) -> None:
    x.copy_(reference.trelu(x))


def _trelu_backward(grad: Tensor, y: Tensor) -> Tensor:
    return grad * torch.where(y > 0, 1, 1 - y * y)


def _depthwise(x, weight, bias, stride, padding, dilation):
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])
    return y.contiguous(memory_format=ops.output_format(x, weight))


def _depthwise_backward(grad, x, weight, stride, padding, dilation, mask):
    return _convolution_backward(grad, x, weight, stride, padding, dilation, x.shape[1], mask)


def _separable(x, dw, pw, db, pb, stride, padding, dilation, inner, activation):
    y = reference.separable_conv2d(x, dw, pw, db, pb, stride, padding, dilation, _name(inner), _name(activation))
    return y.contiguous(memory_format=ops.output_format(x, dw))


def _separable_backward(grad, y, x, dw, pw, db, stride, padding, dilation, inner, activation, mask):
    if activation:
        grad = grad * _derivative_from_output(y, _name(activation))
    depthwise = _depthwise(x, dw, db, stride, padding, dilation)
    activated = reference.activate(depthwise, _name(inner))
    ones, zeros = [1, 1], [0, 0]
    inner_grad, to_pw, to_pb = _convolution_backward(
        grad, activated, pw, ones, zeros, ones, 1, [True, mask[2], mask[4]]
    )
    inner_grad = _activation_backward(inner_grad, depthwise, inner)
    to_x, to_dw, to_db = _depthwise_backward(inner_grad, x, dw, stride, padding, dilation, [mask[0], mask[1], mask[3]])
    return to_x, to_dw, to_pw, to_db, to_pb


@pytest.fixture(scope="module")
def operators():
    defined = ops.define("rkl_test")
    library = torch.library.Library("rkl_test", "IMPL")
    for name, kernel in {
        "trelu": reference.trelu,
        "trelu_": _trelu_,
        "trelu_backward": _trelu_backward,
        "depthwise_conv2d": _depthwise,
        "depthwise_conv2d_backward": _depthwise_backward,
        "separable_conv2d": _separable,
        "separable_conv2d_backward": _separable_backward,
    }.items():
        library.impl(name, kernel, "CPU")
    yield defined
    library._destroy()


def _double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_trelu_gradient_and_second_gradient(operators):
    x = _double(3, 4, 5)
    assert torch.autograd.gradcheck(operators.trelu, x)
    assert torch.autograd.gradgradcheck(operators.trelu, x)


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), (1, 2, 2), (3, 1, 1)])
def test_depthwise_gradient_and_second_gradient(operators, stride, padding, dilation):
    window = [stride, 1], [padding, padding], [1, dilation]

    def call(x, weight, bias):
        return operators.depthwise_conv2d(x, weight, bias, *window)

    inputs = _double(2, 2, 5, 6), _double(2, 1, 3, 2), _double(2)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("inner", [None, "trelu", "gelu"])
@pytest.mark.parametrize("outer", [None, "relu", "relu6", "trelu"])
def test_separable_gradient(operators, inner, outer):
    codes = _checks.activation("inner", inner), _checks.activation("outer", outer)

    def call(*tensors):
        return operators.separable_conv2d(*tensors, [2, 1], [1, 0], [1, 1], *codes)

    inputs = _double(2, 3, 5, 4), _double(3, 1, 3, 2), _double(2, 3, 1, 1), _double(3), _double(2)
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize(("inner", "outer"), [("trelu", "trelu"), ("silu", "relu6"), (None, None)])
def test_separable_second_gradient(operators, inner, outer):
    codes = _checks.activation("inner", inner), _checks.activation("outer", outer)

    def call(*tensors):
        return operators.separable_conv2d(*tensors, [2, 1], [1, 0], [1, 1], *codes)

    inputs = _double(2, 2, 4, 3), _double(2, 1, 3, 2), _double(2, 2, 1, 1), _double(2), _double(2)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_registrations_are_sound(operators):
    x, weight, bias = _double(2, 3, 5, 6), _double(3, 1, 3, 3), _double(3)
    pointwise, window = _double(4, 3, 1, 1), ([1, 1], [1, 1], [1, 1])
    for layout in (torch.contiguous_format, torch.channels_last):
        image = x.detach().clone(memory_format=layout).requires_grad_()
        torch.library.opcheck(operators.trelu.registered, (image,))
        torch.library.opcheck(operators.depthwise_conv2d.registered, (image, weight, bias, *window))
        torch.library.opcheck(
            operators.separable_conv2d.registered, (image, weight, pointwise, None, None, *window, 3, 3)
        )
    torch.library.opcheck(operators.trelu_.registered, (x.detach().clone(),))


class Masks(TorchDispatchMode):
    """Which gradients the operators were asked for, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[bool]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "conv2d_backward" in function.name():
            self.asked.append(args[-1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["depthwise_conv2d", "separable_conv2d"])
def test_only_gradients_that_are_asked_for_are_computed(operators, name):
    """``torch.autograd.grad(loss, image)`` of a network once took as long as all gradients."""
    image, weight, window = _double(2, 3, 6, 6), _double(3, 1, 3, 3), ([1, 1], [1, 1], [1, 1])
    others = (None, *window) if name == "depthwise_conv2d" else (_double(4, 3, 1, 1), None, None, *window, 0, 0)

    def masks(call):
        y = getattr(operators, name)(2 * image, weight, *others)  # as in a network, the operator's image is no leaf
        with Masks() as seen:
            call(y.sum())
        return [mask[:2] for mask in seen.asked]

    assert masks(lambda loss: torch.autograd.grad(loss, image)) == [[True, False]]
    assert masks(lambda loss: torch.autograd.grad(loss, weight)) == [[False, True]]
    assert masks(lambda loss: loss.backward(inputs=[image])) == [[True, False]]
    assert masks(lambda loss: loss.backward()) == [[True, True]]
