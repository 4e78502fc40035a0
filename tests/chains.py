"""Chains of layers as models have them, and the comparison of a fused copy with its model."""

from __future__ import annotations

import torch
from torch import nn

import rkl_kernels as rk

X = torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(1))


def fill(module: nn.Module) -> nn.Module:
    """Give the norms statistics and parameters other than 0 and 1."""
    for m in module.modules():
        if getattr(m, "running_mean", None) is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.weight is not None:
                m.weight.data.normal_()
                m.bias.data.normal_()
    return module


def chain(*inner: nn.Module, norm=nn.BatchNorm2d, outer: tuple[nn.Module, ...] = (), **settings) -> nn.Sequential:
    torch.manual_seed(0)
    settings = {"padding": 1, "bias": False} | settings
    first = nn.Conv2d(6, 6, 3, groups=6, **settings), norm(6), *inner
    return fill(nn.Sequential(*first, nn.Conv2d(6, 4, 1, bias=settings["bias"]), *outer)).eval()


def layers(model: nn.Module) -> list[type[nn.Module]]:
    """The types of the package's layers in a model, and of the norms that are left."""
    return [type(m) for m in model.modules() if isinstance(m, (rk.SeparableConv2d, rk.DepthwiseConv2d, nn.BatchNorm2d))]


def assert_same(fused: nn.Module, plain: nn.Module, x: torch.Tensor = X) -> None:
    """Outputs, with and without gradients, and the image's gradient agree up to float32 rounding."""
    results = []
    for model in (fused, plain):
        image = x.clone().requires_grad_()
        y = model(image)
        (grad,) = torch.autograd.grad(y.square().sum(), image)
        with torch.no_grad():
            results.append((y.detach(), grad, model(x)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


class Flagged(nn.Module):
    """Its forward takes a flag, and may call the layers of its body one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(nn.ReLU())

    def forward(self, x, apart=False):
        if not apart:
            return self.body(x)
        return [x := layer(x) for layer in self.body]
