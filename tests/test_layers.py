"""Layers are drop-in: parameters, initial values, state_dict keys and results of ``torch.nn``."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

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


class Branches(nn.Module):
    """A fusable pair, one with a second reader, one with a batch norm between, and one behind control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Conv2d(4, 4, 1)
        self.e = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same", groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.relu(self.b(self.a(x)))
        shared = self.c(x)
        return self.e(self.d(shared) + shared)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else x


def test_convert_keeps_results_and_keys():
    model = Branches().eval()
    x = torch.randn(2, 4, 7, 7)
    before, keys, weights = model(x), list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    report = rk.convert(model)
    assert report.separable == [("a", "b")]
    assert (report.depthwise, report.folded) == (["c"], [("e.0", "e.1", "e.2")])
    assert list(model.state_dict()) == keys
    assert [p.data_ptr() for p in model.parameters()] == weights
    torch.testing.assert_close(model(x), before)
    assert "1 depthwise + pointwise pairs fused" in str(report)


def test_converted_models_copy_save_and_train():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    plain = copy.deepcopy(model)
    rk.convert(model)
    twin = copy.deepcopy(model)
    twin[1].weight.data.zero_()
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(twin(x), twin[1].bias[:, None, None].expand(1, 2, 4, 4))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), plain(x))
    model(x).sum().backward()
    plain(x).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_convert_leaves_what_it_cannot_serve():
    model = nn.ModuleDict(
        {
            "multiplied": nn.Conv2d(4, 8, 3, groups=4),
            "reflected": nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "plain": nn.Conv2d(1, 1, 3),
            "branching": Branching(),
        }
    )
    report = rk.convert(model)
    assert report.depthwise == ["branching.a"]
    assert set(report.left) == {"multiplied", "reflected"}
    assert "2 filters a channel" in report.left["multiplied"]


def test_convert_does_not_fuse_what_a_hook_looks_at():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    report = rk.convert(model)
    assert (report.separable, report.depthwise) == ([], ["0"])
    model(torch.randn(1, 4, 6, 6))
    assert seen == [(1, 4, 4, 4)]


def test_convert_replaces_activations_on_request():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU6())
    report = rk.convert(model, activation="trelu")
    assert report.activations == ["0"]
    assert isinstance(model[0], rk.TReLU)
    assert model[0].inplace


@pytest.mark.parametrize("name", ["mobilenet_v2", "convnext_tiny"])
def test_convert_of_known_models(name):
    torchvision = pytest.importorskip("torchvision", reason="extra [train] not installed")
    model = getattr(torchvision.models, name)(num_classes=4).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    report = rk.convert(model)
    assert (len(report.depthwise), len(report.folded)) == {"mobilenet_v2": (0, 17), "convnext_tiny": (18, 0)}[name]
    assert not report.left
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
