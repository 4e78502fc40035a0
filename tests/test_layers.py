"""Layers are drop-in: they have the parameters, initial values, state_dict keys and results of ``torch.nn``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import rkl_kernels as rk


def test_depthwise_layer_is_a_conv2d():
    torch.manual_seed(1)
    theirs = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6)
    torch.manual_seed(1)
    ours = rk.DepthwiseConv2d(6, 3, stride=2, padding=1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(ours(x), theirs(x))


def test_separable_layer_is_two_convolutions():
    layer = rk.SeparableConv2d(4, 6, 5, padding=2, depthwise_bias=True, inner_activation="relu6", activation="trelu")
    assert list(layer.state_dict()) == ["depthwise.weight", "depthwise.bias", "pointwise.weight", "pointwise.bias"]
    depthwise = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    pointwise = nn.Conv2d(4, 6, 1)
    depthwise.load_state_dict(layer.depthwise.state_dict())
    pointwise.load_state_dict(layer.pointwise.state_dict())
    x = torch.randn(2, 4, 8, 8)
    expected = rk.reference.trelu(pointwise(nn.functional.relu6(depthwise(x))))
    torch.testing.assert_close(layer(x), expected)


def test_trelu_layer():
    x = torch.randn(5)
    torch.testing.assert_close(rk.TReLU()(x), torch.where(x > 0, x, x.tanh()))
    assert rk.TReLU(inplace=True)(x) is x
    assert "inplace=True" in repr(rk.TReLU(True))


PADDINGS = ((1, 2), "same")


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_modes(mode, padding):
    stride = 1 if padding == "same" else 2
    theirs = nn.Conv2d(4, 4, 3, stride, padding, groups=4, padding_mode=mode)
    ours = rk.DepthwiseConv2d(4, 3, stride, padding, padding_mode=mode)
    ours.load_state_dict(theirs.state_dict())
    pair = rk.SeparableConv2d(4, 6, 3, stride, padding, depthwise_bias=True, padding_mode=mode)
    pair.depthwise.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 7, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    torch.testing.assert_close(pair(x), pair.pointwise(theirs(x)))
    assert f"padding_mode={mode}" in repr(ours)


class Added(nn.Module):
    """A wrapper around a layer, as adapters make."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.base(x) * (1 + self.scale)


def _prune(pair):
    for step in (pair.depthwise, pair.pointwise):
        prune.l1_unstructured(step, "weight", amount=0.4)


def _make_dense(pair):
    pair.depthwise.groups, pair.depthwise.weight = 1, nn.Parameter(torch.randn(4, 4, 3, 3))


def _wrap(pair):
    pair.pointwise, pair.depthwise = Added(pair.pointwise), Added(pair.depthwise)


ALTERED = {
    "pruned": _prune,
    "wrapped": _wrap,
    "made dense": _make_dense,
    "other steps": lambda pair: (
        setattr(pair, "depthwise", rk.DepthwiseConv2d(4, 3, padding=1, multiplier=2)),
        setattr(pair, "pointwise", nn.Conv2d(8, 4, 1, stride=2)),
    ),
    "padded pointwise": lambda pair: setattr(pair.pointwise, "padding", (1, 1)),
    "strided pointwise": lambda pair: setattr(pair.pointwise, "stride", (2, 2)),
    "grouped pointwise": lambda pair: setattr(pair, "pointwise", nn.Conv2d(4, 4, 1, groups=2)),
    "parametrized": lambda pair: parametrizations.spectral_norm(pair.pointwise),
    "hooked": lambda pair: pair.depthwise.register_forward_hook(lambda module, inputs, output: output + 1) and None,
    "forward on the object": lambda pair: setattr(pair.pointwise, "forward", pair.depthwise.forward),
}


class Plain(rk.SeparableConv2d):
    """The same layer, computed by separate calls of its steps."""

    def forward(self, x):
        return rk.reference.trelu(self.pointwise(nn.functional.silu(self.depthwise(x))))


@pytest.mark.parametrize("name", ALTERED)
def test_separable_layer_does_what_its_steps_do_by_now(name):
    """The layer follows its altered steps through training, where a weight computed once would be stale."""
    ours = rk.SeparableConv2d(4, 4, 3, padding=1, inner_activation="silu", activation="trelu")
    theirs = Plain(4, 4, 3, padding=1)
    theirs.load_state_dict(ours.state_dict())
    x, generator = torch.randn(2, 4, 7, 6), torch.get_rng_state()
    for layer in (ours, theirs):
        torch.set_rng_state(generator)
        ALTERED[name](layer)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("step", ["depthwise", "pointwise"])
def test_a_steps_hooks_on_gradients_are_called(step, hook):
    layer, called = rk.SeparableConv2d(4, 4, 3), []
    getattr(layer.get_submodule(step), hook)(lambda *_: called.append(step))
    layer(torch.randn(1, 4, 5, 5, requires_grad=True)).sum().backward()
    assert called == [step]


class Halved(torch.Tensor):
    """Half of a filter. Only PyTorch's convolution doubles it again, as classes of quantized weights do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not nn.functional.conv2d:
            return super().__torch_function__(function, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return function(*(2 * a.as_subclass(torch.Tensor) if isinstance(a, Halved) else a for a in args))

    def __deepcopy__(self, memo):
        return nn.Parameter(self.detach().clone())


@pytest.mark.parametrize("step", ["depthwise", "pointwise"])
def test_a_class_of_filters_that_acts_on_pytorchs_convolution(step):
    pair = rk.SeparableConv2d(8, 4, 3, padding=1, inner_activation="relu", activation="relu6")
    conv = getattr(pair, step)
    apart = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    apart[0 if step == "depthwise" else 3].weight = conv.weight
    x = torch.randn(2, 8, 7, 6)
    expected, of_apart = pair(x), apart.eval()(x)
    conv.weight = nn.Parameter(conv.weight.detach().div(2).as_subclass(Halved))
    apart[0 if step == "depthwise" else 3].weight = conv.weight
    torch.testing.assert_close(pair(x), expected)
    fused = rk.fuse_for_inference(apart)
    torch.testing.assert_close(fused(x), of_apart)
    rk.convert(apart)
    torch.testing.assert_close(apart(x), of_apart)


def test_several_filters_a_channel():
    theirs = nn.Conv2d(4, 12, 3, padding=1, groups=4)
    ours = rk.DepthwiseConv2d(4, 3, padding=1, multiplier=3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 7, 6, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    for got, want in zip(*(torch.autograd.grad(layer(x).sum(), x) for layer in (ours, theirs)), strict=True):
        assert torch.equal(got, want)
    explained = rk.explain("depthwise_conv2d", x, ours.weight, padding=1)
    assert explained.backend == "reference"
    assert explained.operations == 2 * 9 * theirs(x).numel()
    with rk.use_backend("cpu"), pytest.raises(RuntimeError, match="one filter a channel"):
        ours(x)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
def test_images_in_onednns_own_layout():
    """``to_mkldnn`` makes them. PyTorch's convolution takes them together with filters of the common layout."""
    chain = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    model, x = nn.Sequential(*chain).eval(), torch.randn(2, 8, 7, 6)
    converted, pair = copy.deepcopy(model), rk.SeparableConv2d(8, 4, 3, padding=1, inner_activation="relu")
    rk.convert(converted)
    with torch.no_grad():
        for layer in (model[0], converted[0], rk.fuse_for_inference(model), pair):
            found = layer(x.to_mkldnn())
            assert found.layout == torch._mkldnn
            torch.testing.assert_close(found.to_dense(), layer(x))
    assert rk.explain("depthwise_conv2d", x.to_mkldnn(), converted[0].weight).backend == "reference"
    with rk.use_backend("cpu"), pytest.raises(RuntimeError, match=r"serves strided tensors, got torch\._mkldnn"):
        converted[0](x.to_mkldnn())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), rk.TReLU(), rk.TReLU(inplace=True)], ids=str)
def test_activations_and_fused_copies_in_onednns_own_layout(activation):
    """In fused copies: layers with a norm folded into the filter, depthwise and dense, and the separable layer."""
    first, dense = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 3)
    x = torch.randn(2, 8, 7, 6)
    for convolutions in ((first,), (dense,), (first, nn.Conv2d(8, 8, 1))):
        last = nn.Conv2d(8, 8, 3, groups=8)  # a model without depthwise layers is not fused
        model = nn.Sequential(*convolutions, nn.BatchNorm2d(8), activation, last).eval()
        fused = rk.fuse_for_inference(model)
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                found = fused(x.to_mkldnn())
                assert found.layout == torch._mkldnn
                torch.testing.assert_close(found.to_dense(), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize(
    "layer", [rk.TReLU(), rk.SeparableConv2d(8, 4, 3, activation="trelu")], ids=lambda layer: type(layer).__name__
)
def test_gradient_in_onednns_own_layout(layer):
    x = torch.randn(2, 8, 7, 6, requires_grad=True)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x) for y in (layer(x.to_mkldnn()).to_dense(), layer(x)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 7, 6), (4, 7, 6), (2, 16, 7, 6), (2, 24, 7, 6)], ids=str)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_an_image_of_other_channels_is_refused(shape, multiplier):
    """As in PyTorch: filters belong to the layer's own channels, and do not serve fewer channels several times."""
    theirs = nn.Conv2d(8, 8 * multiplier, 3, padding=1, groups=8)
    converted = copy.deepcopy(theirs)
    rk.convert(converted)
    x = torch.randn(shape)
    fused = rk.fuse_for_inference(nn.Sequential(theirs, nn.BatchNorm2d(8 * multiplier), nn.ReLU()))
    for layer in (theirs, converted, rk.DepthwiseConv2d(8, 3, padding=1, multiplier=multiplier), fused):
        for call in (layer, torch.compile(layer, backend="eager")):
            with pytest.raises(RuntimeError, match="to have 8 channels, but got"):
                call(x)
        assert torch.jit.trace(layer, torch.randn(2, 8, 7, 6))(torch.randn(1, 8, 5, 9)).shape[-1] == 9


def test_refused_settings():
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        rk.DepthwiseConv2d(4, 3, padding_mode="mirror")
    with pytest.raises(ValueError, match="multiplier must be at least 1, got 0"):
        rk.DepthwiseConv2d(4, 3, multiplier=0)
    with pytest.raises(TypeError, match="multiplier must be an int, got \\(2, 3\\)"):
        rk.DepthwiseConv2d(4, 3, multiplier=(2, 3))
    with pytest.raises(TypeError, match=r"channels must be an int, got 4.0"):
        rk.DepthwiseConv2d(4.0, 3)
    with pytest.raises(ValueError, match="c_out must be at least 0, got -1"):
        rk.SeparableConv2d(8, -1, 3)
    with pytest.raises(ValueError, match="or a multiple of it, got \\(6, 1, 3, 3\\)"):
        rk.depthwise_conv2d(torch.randn(1, 4, 5, 5), torch.randn(6, 1, 3, 3))
    with pytest.raises(ValueError, match="with C = 4, the channels of x, got"):
        rk.separable_conv2d(torch.randn(1, 4, 5, 5), torch.randn(8, 1, 3, 3), torch.randn(3, 8, 1, 1))
