"""Wrong arguments: one line names the argument, the rule and the value got. It is the same on every backend."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rkl_kernels as rk
from rkl_kernels import ops

X = torch.zeros(2, 4, 8, 8)
W = torch.zeros(4, 1, 3, 3)
P = torch.zeros(6, 4, 1, 1)

WRONG_DEPTHWISE = {
    "not a tensor": (([1, 2], W), {}, TypeError, "x must be a torch.Tensor, got list"),
    "integers": ((X.int(), W.int()), {}, TypeError, "x must be float32.*got torch.int32"),
    "two dimensions": ((X[0, 0], W), {}, ValueError, r"x must have shape \(N, C, H, W\).*got \(8, 8\)"),
    "channels": ((X, W[:3]), {}, ValueError, r"weight must have shape .* C = 4.*got \(3, 1, 3, 3\)"),
    "groups": ((X, torch.zeros(4, 2, 3, 3)), {}, ValueError, r"got \(4, 2, 3, 3\)"),
    "no filter": ((X, torch.zeros(4, 1, 0, 3)), {}, ValueError, "at least 1 x 1"),
    "mixed types": ((X, W.double()), {}, TypeError, "weight must have the type of x, torch.float32, got torch.float64"),
    "other device": ((X, W.to("meta")), {}, ValueError, "weight must be on the device of x, cpu, got meta"),
    "bias": ((X, W, torch.zeros(3)), {}, ValueError, r"bias must have shape \(4,\).*got \(3,\)"),
    "stride": ((X, W), {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "negative padding": ((X, W), {"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    "dilation": ((X, W), {"dilation": (1, 0)}, ValueError, r"dilation must be at least 1, got \(1, 0\)"),
    "triple": ((X, W), {"stride": (1, 2, 3)}, TypeError, "stride must be an int or a pair of ints"),
    "fraction": ((X, W), {"stride": 1.5}, TypeError, "stride must be an int or a pair of ints, got 1.5"),
    "padding word": ((X, W), {"padding": "full"}, ValueError, "padding must be 'same', 'valid'.*got 'full'"),
    "same with stride": ((X, W), {"padding": "same", "stride": 2}, ValueError, "padding='same' needs stride 1"),
    "filter too large": ((X, W), {"dilation": 4}, ValueError, r"filter \(9 x 9\) must fit .* got 8 x 8"),
}


@pytest.mark.parametrize(("args", "window", "kind", "message"), WRONG_DEPTHWISE.values(), ids=WRONG_DEPTHWISE)
def test_depthwise(backend, args, window, kind, message):
    with pytest.raises(kind, match=message) as caught:
        rk.depthwise_conv2d(*args, **window)
    assert "\n" not in str(caught.value)
    if args[0] is X and args[1].device == X.device:  # programs that know F.conv2d catch the types of its errors
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            F.conv2d(*args, **window, groups=4)
        assert isinstance(caught.value, theirs.type)


NO_PAIRS = [{1, 2}, {1: 1, 2: 2}, np.array([1, 2]), (Fraction(5, 2), 1), [1, 1.5], iter((1, 2))]


@pytest.mark.parametrize("value", NO_PAIRS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_no_pairs(name, value):
    """Also in a plain call, where PyTorch would convert the numbers: a set in any order, a fraction rounded down."""
    message = f"{name} must be .*an int or a pair of ints, got "
    with pytest.raises(TypeError, match=message):
        rk.depthwise_conv2d(X, W, **{name: value})
    with pytest.raises(TypeError, match=message):
        rk.separable_conv2d(X, W, P, **{name: value})
    layer = rk.DepthwiseConv2d(4, 3)
    setattr(layer, name, value)
    with pytest.raises(TypeError, match=message):
        layer(X)


@pytest.mark.parametrize(
    ("args", "settings", "kind", "message"),
    [
        ((X, W, P[:, :3]), {}, ValueError, r"pointwise_weight must have shape \(C_out, C, 1, 1\) with C = 4"),
        ((X, W[:2], P), {}, ValueError, "depthwise_weight must have shape"),
        ((X, W, P, torch.zeros(6)), {}, ValueError, r"depthwise_bias must have shape \(4,\)"),
        ((X, W, P, None, torch.zeros(4)), {}, ValueError, r"pointwise_bias must have shape \(6,\)"),
        ((X, W, P), {"activation": "tanh"}, ValueError, "activation must be None or one of relu.*got 'tanh'"),
        ((X, W, P), {"inner_activation": "ReLU"}, ValueError, "inner_activation must be None or one of"),
    ],
)
def test_separable(backend, args, settings, kind, message):
    with pytest.raises(kind, match=message):
        rk.separable_conv2d(*args, **settings)


def test_trelu(backend):
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got int"):
        rk.trelu(3)
    with pytest.raises(TypeError, match=r"got torch.int64"):
        rk.trelu(torch.arange(3))
    leaf = torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        rk.trelu(leaf, inplace=True)
    assert torch.equal(leaf, torch.zeros(3))


def test_layers():
    with pytest.raises(ValueError, match="kernel_size must be at least 1, got 0"):
        rk.DepthwiseConv2d(4, 0)
    with pytest.raises(ValueError, match="activation must be None or one of"):
        rk.SeparableConv2d(4, 4, 3, activation="swish")
    with pytest.raises(ValueError, match="activation must be None or 'trelu'"):
        rk.convert(torch.nn.ReLU(), activation="relu")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        rk.convert(X)


def test_backends():
    with pytest.raises(ValueError, match="backend must be one of"), rk.use_backend("gpu"):
        pass
    with rk.use_backend("cpu"), pytest.raises(RuntimeError, match=r"cannot serve this call.*float64"):
        rk.trelu(X.double())
    with pytest.raises(ValueError, match="operator must be one of"):
        rk.explain("conv3d", X)
    with pytest.raises(KeyError), rk.use_backend("reference"):
        raise KeyError
    assert rk.explain("trelu", X).backend == "cpu", "as before, also after an error in the block"
    for name, status in rk.backends().items():
        if not status.available:
            with pytest.raises(RuntimeError, match="not available"), rk.use_backend(name):
                pass


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        ("depthwise_conv2d", (X, W[:3], None, [1, 1], [0, 0], [1, 1])),
        ("depthwise_conv2d", (X[0], W, None, [1, 1], [0, 0], [1, 1])),
        ("depthwise_conv2d", (X, W, torch.zeros(9), [1, 1], [0, 0], [1, 1])),
        ("depthwise_conv2d", (X, W, None, [0, 1], [0, 0], [1, 1])),
        ("depthwise_conv2d", (X, W, None, [1, 1], [-2, 0], [1, 1])),
        ("depthwise_conv2d", (X, W, None, [1, 1], [0, 0], [9, 1])),
        ("depthwise_conv2d", (X.double(), W.double(), None, [1, 1], [0, 0], [1, 1])),
        ("depthwise_conv2d", (X, W.bfloat16(), None, [1, 1], [0, 0], [1, 1])),
        ("depthwise_conv2d_backward", (X, X, W, [1, 1], [0, 0], [1, 1], [True, True, True])),
        ("separable_conv2d", (X, W, P[:, :2], None, None, [1, 1], [1, 1], [1, 1], 0, 0)),
        ("separable_conv2d", (X, W, P, None, torch.zeros(5), [1, 1], [1, 1], [1, 1], 0, 0)),
        ("trelu_backward", (X, X[:1])),
        ("trelu", (X.int(),)),
    ],
)
def test_direct_calls_cannot_read_out_of_bounds(operator, args):
    """torch.ops.rkl can be called without the checks of the public functions, so C++ has its own guard."""
    with pytest.raises(RuntimeError):
        getattr(ops.rkl, operator)(*args)


def test_what_is_no_tensor_is_told_whatever_else_is_asked():
    w, p = torch.randn(2, 1, 3, 3), torch.randn(2, 2, 1, 1)
    for activation in (None, "relu", "silu"):
        with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
            rk.separable_conv2d([1], w, p, activation=activation)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn])
def test_a_type_that_pytorch_refuses_is_refused_as_there(dtype):
    x, w = torch.zeros(1, 2, 4, 4).to(dtype), torch.zeros(2, 1, 3, 3).to(dtype)
    for call in (torch.nn.functional.conv2d, rk.depthwise_conv2d):
        with pytest.raises(RuntimeError):
            call(x, w)
