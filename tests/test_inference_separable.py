"""rk.fuse_for_inference on models built from rk.SeparableConv2d."""

from __future__ import annotations

import pytest
import torch
from chains import assert_same, fill, layers
from torch import nn
from torch.nn.utils import prune

import rkl_kernels as rk


def separable(*behind: nn.Module, **settings) -> nn.Sequential:
    torch.manual_seed(0)
    layer = rk.SeparableConv2d(6, 4, 3, padding=1, **settings)
    return fill(nn.Sequential(layer, *behind)).eval()


@pytest.mark.parametrize("inner", [None, "relu6"])
@pytest.mark.parametrize("outer", [(), (nn.ReLU(),), (nn.Dropout(), rk.TReLU(), nn.Identity())], ids=len)
def test_a_norm_behind_a_separable_layer(inner, outer):
    plain = separable(nn.BatchNorm2d(4), *outer, inner_activation=inner, bias=False, stride=2)
    fused = rk.fuse_for_inference(plain)
    (found,), left = fused.fusion_report.fused, fused.fusion_report.left
    assert found == tuple(str(i) for i in range(len(found)))
    assert len(found) == (4 if len(outer) == 3 else len(plain))
    assert not left
    assert layers(fused) == [rk.SeparableConv2d, rk.DepthwiseConv2d]
    assert_same(fused, plain)
    again = rk.fuse_for_inference(fused)
    assert not again.fusion_report.left
    assert_same(again, plain)


def test_an_activation_behind_a_separable_layer():
    plain = separable(nn.SiLU(), nn.Conv2d(4, 4, 1))
    assert rk.fuse_for_inference(plain).fusion_report.fused == [("0", "1")]
    assert_same(rk.fuse_for_inference(plain), plain)


@pytest.mark.parametrize("alter", ["activated", "pruned", "hooked", "replaced", "taken"])
def test_what_a_separable_layer_does_otherwise_is_kept(alter):
    plain = separable(nn.BatchNorm2d(4), nn.ReLU(), activation="silu" if alter == "activated" else None)
    if alter == "pruned":
        prune.l1_unstructured(plain[0].depthwise, "weight", amount=0.5)
    if alter == "hooked":
        plain[0].pointwise.register_forward_hook(lambda module, inputs, output: output + 1)
    if alter == "replaced":
        plain[0].pointwise = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Tanh())
    if alter == "taken":
        plain = Scaled(plain).eval()
    fused = rk.fuse_for_inference(plain)
    assert not fused.fusion_report.fused
    assert bool(fused.fusion_report.left) == (alter not in ("activated", "taken"))
    assert_same(fused, plain)


class Scaled(nn.Module):
    """Its forward uses a layer's weight directly."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x) * self.body[0].depthwise.weight.sum()
