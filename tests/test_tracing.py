"""Counters and tracers: FlopCounterMode, torch.fx, torch.jit.trace. Also meta, fake and complex tensors."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import rkl_kernels as rk

X, W, P = torch.randn(2, 3, 8, 7), torch.randn(3, 1, 3, 3), torch.randn(4, 3, 1, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = rk.DepthwiseConv2d(3, 3, padding=1)
        self.separable = rk.SeparableConv2d(3, 4, 3, stride=2, inner_activation="relu", activation="trelu")
        self.act = rk.TReLU()

    def forward(self, x):
        return self.act(self.separable(self.depthwise(x)) - 0.1)


def flops(function, *shapes, backward):
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        y = function(*tensors)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


# PyTorch's count of a filter's gradient ignores the groups and is C times too large. So C is 1 with a gradient.
@pytest.mark.parametrize(("channels", "backward"), [(6, False), (1, True)])
def test_flops_are_those_of_convolutions(channels, backward):
    shapes = (2, channels, 9, 8), (channels, 1, 3, 3), (5, channels, 1, 1)
    for call in (
        lambda library, x, w, p: library.depthwise_conv2d(x, w, stride=2),
        lambda library, x, w, p: library.separable_conv2d(x, w, p, padding=1, activation="trelu"),
        lambda library, x, w, p: library.trelu(x),
    ):
        ours, theirs = (flops(lambda *t: call(lib, *t), *shapes, backward=backward) for lib in (rk, rk.reference))  # noqa: B023
        assert ours == theirs


def test_flops_of_a_backward_are_twice_the_forwards():
    shapes = (2, 6, 9, 8), (6, 1, 3, 3), (5, 6, 1, 1)
    call = rk.separable_conv2d
    assert flops(call, *shapes, backward=True) == 3 * flops(call, *shapes, backward=False) > 0
    assert flops(lambda x, w, _: rk.depthwise_conv2d(x, w), *shapes, backward=True) == 3 * 2 * 2 * 6 * 7 * 6 * 9


def test_flops_of_a_backward_alone():
    x, w, p = (torch.randn(shape, requires_grad=True) for shape in ((2, 6, 9, 8), (6, 1, 3, 3), (5, 6, 1, 1)))
    for y, forward in (
        (rk.depthwise_conv2d(x, w), 2 * 2 * 6 * 7 * 6 * 9),
        (rk.separable_conv2d(x, w, p), 2 * 2 * 7 * 6 * 6 * (9 + 5)),
    ):
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 2 * forward


def test_flops_of_a_biass_gradient():
    """It is a sum, which counts as nothing. For a depthwise bias the gradient of the pointwise step comes first."""
    x, w, p, b = torch.randn(2, 6, 9, 8), torch.randn(6, 1, 3, 3), torch.randn(5, 6, 1, 1), torch.randn(6)
    b.requires_grad_()
    for y, before in ((rk.depthwise_conv2d(x, w, b), 0), (rk.separable_conv2d(x, w, p, b), 2 * 2 * 7 * 6 * 6 * 5)):
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == before


class Names(TorchDispatchMode):
    """Notes the convolutions called in the block, those of our namespaces and PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "conv" in function.name():
            self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_mode_of_the_dispatcher_sees_our_operators():
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    with Names() as names:
        rk.depthwise_conv2d(x, w).sum().backward()
    assert names.seen == ["rkl::depthwise_conv2d", "rkl::depthwise_conv2d_backward"]


def test_fx_traces_layers_and_converted_models():
    plain = nn.Sequential(
        nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1),
    ).eval()  # fmt: skip
    converted = copy.deepcopy(plain)
    rk.convert(converted, activation="trelu")
    for model in (Net(), converted):
        traced = torch.fx.symbolic_trace(model)
        targets = {node.target for node in traced.graph.nodes if node.op == "call_function"}
        assert rk.depthwise_conv2d in targets or rk.separable_conv2d in targets
        torch.testing.assert_close(traced(X), model(X))


def test_feature_extraction():
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="extra [train] not installed")
    net = Net().eval()
    features = extraction.create_feature_extractor(net, ["separable", "act"])(X)
    torch.testing.assert_close(features["act"], net(X))


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_quantization_prepares_a_model():
    quantization = pytest.importorskip("torch.ao.quantization.quantize_fx", reason="this torch has no FX quantization")
    from torch.ao.quantization import get_default_qconfig_mapping

    net = nn.Sequential(rk.DepthwiseConv2d(3, 3), nn.Conv2d(3, 4, 1)).eval()
    prepared = quantization.prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping("x86"), (X,))
    torch.testing.assert_close(prepared(X), net(X))


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_jit_trace_is_the_same_in_every_grad_mode():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), rk.TReLU(inplace=True))
    model.eval()
    rk.convert(model)
    graphs = []
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            traced = torch.jit.trace(model, X)
        graphs.append(
            [node.kind() for node in traced.inlined_graph.nodes() if "::conv" in node.kind() or "rkl" in node.kind()]
        )
        for image in (X, torch.randn(5, 3, 10, 9)):
            torch.testing.assert_close(traced(image), model(image), rtol=1e-4, atol=1e-4)
    assert graphs[0] == graphs[1]
    assert any("rkl" in kind for kind in graphs[0])


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_traced_activation_that_keeps_its_input(activation, mode):
    """torch.jit.trace compares its graph with a second one, made without gradients."""
    layer = rk.SeparableConv2d(3, 4, 3, activation=activation)
    with mode():
        traced = torch.jit.trace(layer, X)
    inputs = [X.clone().requires_grad_(), *layer.parameters()]
    ours, theirs = (torch.autograd.grad(function(inputs[0]).square().sum(), inputs) for function in (traced, layer))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_make_fx_sees_the_operators():
    traced = make_fx(Net())(X)
    kinds = [node.target for node in traced.graph.nodes]
    assert torch.ops.rkl.separable_conv2d.default in kinds


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_meta_and_fake_tensors_have_the_shapes_of_real_ones(layout):
    net = Net().to(memory_format=layout)
    x = X.to(memory_format=layout)
    real = net(x)
    meta = copy.deepcopy(net).to("meta")(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(net).to("meta")(x.to("meta")).dtype == torch.float32  # autocast is the CPU's
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = net(mode.from_tensor(x))
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_complex_tensors_are_the_references():
    x, w, p = (t.to(torch.complex64) * (1 + 1j) for t in (X, W, P))
    torch.testing.assert_close(rk.depthwise_conv2d(x, w), F.conv2d(x, w, groups=3))
    torch.testing.assert_close(rk.separable_conv2d(x, w, p), F.conv2d(F.conv2d(x, w, groups=3), p))
    assert rk.explain("depthwise_conv2d", x, w).backend == "reference"
    with pytest.raises(TypeError, match=r"got torch.complex64"):
        rk.trelu(x)


class Tagged(torch.Tensor):
    """A subclass that adds nothing."""


def test_subclasses_and_modes_are_served_as_by_pytorchs_functions():
    x = X.as_subclass(Tagged)
    for ours, theirs in (
        (rk.depthwise_conv2d(x, W), F.conv2d(x, W, groups=3)),
        (rk.separable_conv2d(x, W, P), F.conv2d(F.conv2d(x, W, groups=3), P)),
        (rk.trelu(x), rk.reference.trelu(x)),
    ):
        assert type(ours) is type(theirs) is Tagged
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))
    with torch.device("cpu"):  # a mode that sees every function
        assert type(rk.trelu(X)) is torch.Tensor


def test_integers_of_other_kinds():
    for stride in (np.int64(2), (np.int32(2), 2), [np.int64(2), np.int64(2)], torch.tensor(2)):
        y = rk.depthwise_conv2d(X, W, stride=stride, padding=np.int64(1), dilation=(np.int8(1),))
        torch.testing.assert_close(y, F.conv2d(X, W, stride=2, padding=1, groups=3))
    assert rk.DepthwiseConv2d(3, np.int64(3), stride=np.int64(2)).stride == (2, 2)
