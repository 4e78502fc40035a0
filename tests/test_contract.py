"""The public functions on every CPU backend have the arguments, results, layouts and gradients of ``F.conv2d``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from exactness import TYPES, assert_rounded, layouts

import rkl_kernels as rk
from rkl_kernels import _checks

WINDOWS = {
    "plain": {},
    "padded": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "pairs": {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 2)},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "listed": {"stride": [3], "padding": [1]},
}


def _exact(x, weight, bias, **window):
    """F.conv2d in float64, and the same on absolute values."""
    groups = weight.shape[0]
    exact = F.conv2d(x.double(), weight.double(), bias.double(), groups=groups, **window)
    return exact, F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), groups=groups, **window)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_depthwise_is_conv2d(backend, window, layout, dtype):
    x = layouts(torch.randn(2, 5, 11, 9).to(dtype))[layout]
    weight, bias = torch.randn(5, 1, 3, 3).to(dtype), torch.randn(5).to(dtype)
    y = rk.depthwise_conv2d(x, weight, bias, **window)
    assert_rounded(y, *_exact(x, weight, bias, **window), terms=9)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 8, 13, 31])
def test_every_filter_size(backend, size):
    x, weight, bias = torch.randn(1, 3, 12, 33), torch.randn(3, 1, size, size), torch.randn(3)
    for image in layouts(x).values():
        y = rk.depthwise_conv2d(image, weight, bias, padding=size // 2)
        assert_rounded(y, *_exact(x, weight, bias, padding=size // 2), terms=size * size)


@pytest.mark.parametrize("kernel", [(2, 2), (4, 3), (1, 6)])
def test_same_padding_with_even_filters(backend, kernel):
    x, weight, bias = torch.randn(2, 3, 7, 8), torch.randn(3, 1, *kernel), torch.randn(3)
    y = rk.depthwise_conv2d(x, weight, bias, padding="same")
    assert y.shape == x.shape
    assert_rounded(y, *_exact(x, weight, bias, padding="same"), terms=24)


def test_unbatched_image(backend):
    x, weight = torch.randn(3, 8, 8), torch.randn(3, 1, 3, 3)
    assert rk.depthwise_conv2d(x, weight).shape == F.conv2d(x, weight, groups=3).shape == (3, 6, 6)
    assert rk.separable_conv2d(x, weight, torch.randn(4, 3, 1, 1), padding=1).shape == (4, 8, 8)


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (1, 1, 5, 5), (2, 4, 1, 1), (1, 4, 6, 1), (0, 4, 6, 6)])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("w_strides", [(9, 9, 3, 1), (9, 1, 3, 1)])
def test_memory_format_is_that_of_conv2d(backend, shape, x_format, w_strides):
    x = torch.randn(shape).to(memory_format=x_format)
    weight = torch.randn(shape[1], 1, 3, 3).as_strided((shape[1], 1, 3, 3), w_strides)
    ours = rk.depthwise_conv2d(x, weight, padding=1)
    theirs = F.conv2d(x, weight, padding=1, groups=shape[1])
    assert ours.shape == theirs.shape
    for d in range(4):
        assert ours.shape[d] == 1 or ours.numel() == 0 or ours.stride(d) == theirs.stride(d), (
            ours.stride(),
            theirs.stride(),
        )


ACTIVATIONS = (None, "relu", "relu6", "trelu", "silu", "gelu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("inner", ACTIVATIONS)
def test_separable_is_two_convolutions(backend, inner, activation):
    x = torch.randn(2, 6, 9, 7)
    tensors = [torch.randn(6, 1, 3, 3), torch.randn(5, 6, 1, 1), torch.randn(6), torch.randn(5)]
    window = {"stride": 2, "padding": 1}
    exact = rk.reference.separable_conv2d(
        x.double(), *[t.double() for t in tensors], **window, inner_activation=inner, activation=activation
    )
    # The steepest slope of an activation is 1.13 (gelu's). Magnitudes pass through it twice, which makes 1.3.
    size = [t.double().abs() for t in (x, *tensors)]
    magnitude = 1.3 * rk.reference.separable_conv2d(*size, **window)
    for image in layouts(x).values():
        y = rk.separable_conv2d(image, *tensors, **window, inner_activation=inner, activation=activation)
        assert_rounded(y, exact, magnitude, terms=9 + 6)


def _gradients(function, tensors, grad):
    leaves = [
        None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors
    ]
    function(*leaves).backward(grad)
    return [None if leaf is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_depthwise_gradients(backend, window, layout):
    tensors = [torch.randn(2, 5, 11, 9), torch.randn(5, 1, 3, 3), torch.randn(5)]
    images = layouts(tensors[0])
    shape = F.conv2d(*tensors, groups=5, **window).shape
    grad = layouts(torch.randn(shape))[layout]
    ours = _gradients(lambda *t: rk.depthwise_conv2d(*t, **window), [images[layout], *tensors[1:]], grad)

    def reference(*t):
        return F.conv2d(*t, groups=5, **window)

    exact = _gradients(reference, [t.double() for t in tensors], grad.double())
    sizes = _gradients(reference, [t.double().abs() for t in tensors], grad.double().abs())
    for our, ex, magnitude in zip(ours, exact, sizes, strict=True):
        assert_rounded(our, ex, magnitude, terms=shape[0] * shape[2] * shape[3])


@pytest.mark.parametrize(
    ("inner", "activation"), [(None, None), ("trelu", "trelu"), ("silu", "gelu"), ("relu6", "relu")]
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
def test_separable_gradients(backend, layout, inner, activation):
    tensors = [
        torch.randn(2, 6, 7, 8),
        torch.randn(6, 1, 3, 3),
        torch.randn(5, 6, 1, 1),
        torch.randn(6),
        torch.randn(5),
    ]
    settings = {"stride": 1, "padding": 1, "inner_activation": inner, "activation": activation}
    grad = layouts(torch.randn(2, 5, 7, 8))[layout]
    ours = _gradients(lambda *t: rk.separable_conv2d(*t, **settings), [layouts(tensors[0])[layout], *tensors[1:]], grad)
    exact = _gradients(
        lambda *t: rk.reference.separable_conv2d(*t, **settings), [t.double() for t in tensors], grad.double()
    )
    # Slopes are computed from rounded values, so the bound is relative to the gradients' scale, not to each value.
    for our, ex in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), ex, rtol=2e-5, atol=2e-5 * ex.abs().max().item())


def test_frozen_tensors_get_no_gradient(backend):
    x, weight, bias = torch.randn(2, 3, 6, 6), torch.randn(3, 1, 3, 3, requires_grad=True), torch.randn(3)
    rk.depthwise_conv2d(x, weight, bias).sum().backward()
    assert x.grad is None
    assert bias.grad is None
    assert weight.grad is not None


class Stop(torch.autograd.Function):
    """A step that gives no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


X, W, P = torch.randn(1, 4, 9, 9), torch.randn(4, 1, 3, 3), torch.randn(5, 4, 1, 1)
WINDOW = [1, 1], [0, 0], [1, 1]
CALLS = {
    "trelu": (rk.trelu, X),
    "trelu_": (lambda x: rk.trelu(x * 1, inplace=True), X),
    "depthwise": (rk.depthwise_conv2d, X, W),
    "separable": (rk.separable_conv2d, X, W, P),
    "registered trelu": (torch.ops.rkl.trelu, X),
    "registered depthwise": (lambda x, w: torch.ops.rkl.depthwise_conv2d(x, w, None, *WINDOW), X, W),
    "registered separable": (lambda *t: torch.ops.rkl.separable_conv2d(*t, None, None, *WINDOW, 0, 0), X, W, P),
}


@pytest.mark.parametrize("name", CALLS)
def test_where_no_gradient_comes_none_goes_on(backend, name):
    """As through PyTorch's layers. Given zeros, an optimizer would decay the weights of a part that is cut off."""
    function, *tensors = CALLS[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    Stop.apply(function(*leaves)).sum().backward()
    grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    sum(Stop.apply(grad).sum() for grad in grads).backward()
    assert [leaf.grad for leaf in leaves] == [None] * len(leaves)


def test_second_gradient_of_depthwise(backend):
    x, weight = torch.randn(1, 2, 5, 5, requires_grad=True), torch.randn(2, 1, 3, 3, requires_grad=True)

    def penalty(function):
        y = function(x, weight)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, weight))

    ours = penalty(lambda x, w: rk.depthwise_conv2d(x, w, padding=1))
    theirs = penalty(lambda x, w: F.conv2d(x, w, padding=1, groups=2))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", TYPES)
def test_trelu(backend, dtype):
    x = torch.cat([torch.randn(1000) * 4, torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), -1e-30])])
    x = x.to(dtype)
    y = rk.trelu(x)
    assert_rounded(y, rk.reference.trelu(x.double()), roundings=1, terms=2)
    assert y[x == -float("inf")].item() == -1


def test_trelu_keeps_its_output_alone():
    x = torch.randn(64, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), rk.use_backend("cpu"):
        y = rk.trelu(x)
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]


def test_trelu_in_place(backend):
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    outside = x.detach().clone()
    assert rk.trelu(outside, inplace=True) is outside
    for image in (x, x.to(memory_format=torch.channels_last), x[:, ::2], x.transpose(2, 3)):
        fresh = image * 1.0
        y = rk.trelu(fresh, inplace=True)
        assert y.data_ptr() == fresh.data_ptr()
        (ours,) = torch.autograd.grad(y.square().sum(), x)
        (theirs,) = torch.autograd.grad(rk.reference.trelu(image).square().sum(), x)
        torch.testing.assert_close(ours, theirs)


def test_trelu_gradient_at_the_edges(backend):
    x = torch.tensor([-float("inf"), -100.0, 0.0, 1.0, 100.0], requires_grad=True)
    rk.trelu(x).sum().backward()
    assert x.grad.tolist()[1:] == [0.0, 1.0, 1.0, 1.0]
    if backend != "reference":  # autograd of where() multiplies 0 by the infinite branch's slope
        assert x.grad[0] == 0


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (0, 4, 3, 3)])
def test_empty_batch(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    weight, pointwise = torch.randn(4, 1, 3, 3, requires_grad=True), torch.randn(6, 4, 1, 1, requires_grad=True)
    assert rk.trelu(x).shape == shape
    y = rk.separable_conv2d(rk.depthwise_conv2d(x, weight, padding=1), weight, pointwise, padding=1)
    assert y.shape == (0, 6, *shape[2:])
    y.sum().backward()
    assert weight.grad.count_nonzero() == 0
    assert pointwise.grad.count_nonzero() == 0


def test_caller_tensors_are_left_alone(backend):
    tensors = [
        torch.randn(2, 4, 6, 6),
        torch.randn(4, 1, 3, 3),
        torch.randn(5, 4, 1, 1),
        torch.randn(4),
        torch.randn(5),
    ]
    before = [t.clone() for t in tensors]
    leaves = [t.requires_grad_() for t in tensors]
    y = rk.separable_conv2d(*leaves, padding=1, inner_activation="trelu", activation="trelu")
    grad = torch.randn_like(y)
    kept = grad.clone()
    y.backward(grad)
    assert torch.equal(grad, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_a_depthwise_bias_that_changes_before_backward_is_refused():
    layer = rk.SeparableConv2d(4, 6, 3, depthwise_bias=True)
    y = layer(X)
    with torch.no_grad():
        layer.depthwise.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_plain_call_needs_no_rules(monkeypatch):
    """C++ refuses what the rules refuse. If it refused a right call too, each such call would be made twice."""

    def fail(*_):
        raise AssertionError("asked for rules")

    monkeypatch.setattr(_checks, "depthwise", fail)
    monkeypatch.setattr(_checks, "separable", fail)
    x, w, p, b = torch.randn(2, 4, 6, 6), torch.randn(4, 1, 3, 3), torch.randn(5, 4, 1, 1), torch.randn(4)
    for window in (1, 1, 1), ((2, 1), (1, 0), (1, 2)), ([1, 1], [0, 1], [1, 1]):
        for grad in False, True:
            image = x.clone().requires_grad_(grad)
            assert rk.depthwise_conv2d(image, w, b, *window).requires_grad == grad
            assert rk.separable_conv2d(image, w, p, b, None, *window, "silu", "gelu").requires_grad == grad
