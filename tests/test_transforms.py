"""Layers under torch.compile and autocast, and the registrations of the operators by opcheck and decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rkl_kernels as rk
from rkl_kernels import ops
from rkl_kernels.decompositions import DECOMPOSITIONS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = rk.DepthwiseConv2d(4, 3, padding="same")
        self.separable = rk.SeparableConv2d(4, 6, 5, stride=2, padding=2, inner_activation="trelu", activation="trelu")
        self.act = rk.TReLU()

    def forward(self, x):
        return self.separable(self.act(self.depthwise(x)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiles_whole_and_once(layout):
    torch.compiler.reset()
    net = Net().to(memory_format=layout)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5):
            x = torch.randn(batch, 4, 10, 12).to(memory_format=layout)
            net.zero_grad()
            expected = net(x)
            expected.square().sum().backward()
            grads = [p.grad.clone() for p in net.parameters()]
            net.zero_grad()
            y = compiled(x)
            y.square().sum().backward()
            torch.testing.assert_close(y, expected)
            assert y.stride() == expected.stride()
            for p, grad in zip(net.parameters(), grads, strict=True):
                torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_convolutions(backend, dtype):
    x, weight = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    pointwise = torch.randn(5, 4, 1, 1)
    with torch.autocast("cpu", dtype):
        y = rk.depthwise_conv2d(x, weight, padding=1)
        assert y.dtype == dtype
        assert rk.separable_conv2d(x, weight, pointwise).dtype == dtype
        assert rk.trelu(x).dtype == torch.float32
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("graph", ["export", "trace", "compile"])
def test_autocast_lowers_the_convolutions_of_a_graph(graph):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), rk.DepthwiseConv2d(8, 3), rk.SeparableConv2d(8, 4, 3, activation="relu6"))
    x = torch.randn(2, 3, 9, 9)
    made = {
        "export": lambda: torch.export.export(net, (x,)).module(),
        "trace": lambda: torch.jit.trace(net, x),
        "compile": lambda: torch.compile(net, backend="aot_eager", fullgraph=True),
    }[graph]()
    with torch.autocast("cpu", torch.bfloat16):
        expected, y = net(x), made(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected.float().square().sum(), list(net.parameters()))
    got = torch.autograd.grad(y.float().square().sum(), list(made.parameters()))
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)


def test_autocast_leaves_float64_as_pytorch_does():
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 1, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert rk.depthwise_conv2d(x.double(), weight.double()).dtype == torch.float64
        for mixed in ((x, weight.double()), (x.double(), weight)):
            with pytest.raises(RuntimeError):
                nn.functional.conv2d(*mixed, groups=4)
            with pytest.raises(RuntimeError, match="type"):
                rk.depthwise_conv2d(*mixed)


def test_autocast_leaves_what_it_is_not_for():
    x, weight = torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"x must be float32.*got torch.int32"):
            rk.depthwise_conv2d(x.int(), weight)
        assert rk.depthwise_conv2d(x.cfloat(), weight.cfloat()).dtype == torch.complex64
        assert rk.depthwise_conv2d(x.to("meta"), weight.to("meta")).dtype == torch.float32


def _arguments(layout, dtype):
    """The arguments of one or several calls of each operator."""
    window = [2, 1], [1, 1], [1, 1]

    def leaf(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    x = leaf(2, 3, 7, 6).detach().clone(memory_format=layout).requires_grad_()
    weight, pointwise, bias = leaf(3, 1, 3, 3), leaf(4, 3, 1, 1), leaf(3)
    yield "trelu", (x,)
    yield "trelu_backward", (x, x)
    yield "trelu_", (x.detach().clone(),)
    yield "depthwise_conv2d", (x, weight, bias, *window)
    yield "separable_conv2d", (x, weight, pointwise, bias, None, *window, 3, 3)
    grad = torch.randn(ops.rkl.depthwise_conv2d(x, weight, bias, *window).shape).to(dtype)
    for mask in ([True, True, True], [False, True, False], [True, False, False]):
        yield "depthwise_conv2d_backward", (grad, x, weight, *window, mask)
    y = ops.rkl.separable_conv2d(x, weight, pointwise, bias, None, *window, 5, 3).detach()
    for mask in ([True] * 5, [False, False, True, False, True], [True, False, False, True, False]):
        yield "separable_conv2d_backward", (torch.randn_like(y), y, x, weight, pointwise, bias, *window, 5, 3, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_registrations_are_sound(layout, dtype):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for name, arguments in _arguments(layout, dtype):
        torch.library.opcheck(getattr(torch.ops.rkl, name).default, arguments, test_utils=checks)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_operators_are_what_they_decompose_into(layout):
    for name, arguments in _arguments(layout, torch.float32):
        if name in DECOMPOSITIONS:
            torch.testing.assert_close(
                getattr(ops.rkl, name)(*arguments), DECOMPOSITIONS[name](*arguments), rtol=1e-4, atol=1e-4
            )


def test_every_thread_count_gives_the_same_bits():
    """Sums are split by the shape, never by the number of threads."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            net = Net()
            x = torch.randn(9, 4, 33, 35, requires_grad=True)
            y = net(x)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, *[p.grad for p in net.parameters()]])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
