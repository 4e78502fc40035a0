"""rk.convert over a batch norm: one call in inference, the layers' own work otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rkl_kernels as rk
from rkl_kernels import fold


def network(*activation: nn.Module, nested: bool = False, bias: bool = False, affine: bool = True) -> nn.Sequential:
    """Depthwise, batch norm with statistics of its own, activation, pointwise."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    first = [nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=bias), norm, *activation]
    before = [nn.Sequential(*first)] if nested else first
    return nn.Sequential(*before, nn.Conv2d(6, 4, 1, bias=bias)).eval()


def calls_of_separable(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    whole = fold.separable_conv2d
    monkeypatch.setattr(fold, "separable_conv2d", lambda *args: made.append(1) or whole(*args))
    return made


X = torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kinds", [(), (nn.ReLU6,), (nn.SiLU,), (rk.TReLU,)], ids=["none", "6", "silu", "trelu"])
@pytest.mark.parametrize(("bias", "affine"), [(False, True), (True, False)])
def test_one_call_in_inference(monkeypatch, nested, kinds, bias, affine):
    model = network(*(kind() for kind in kinds), nested=nested, bias=bias, affine=affine)
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(X)
    report = rk.convert(model)
    made = calls_of_separable(monkeypatch)
    assert len(report.folded) == 1
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    assert made == [1]


def test_training_and_gradients_are_the_layers_own(monkeypatch):
    plain = network(nn.ReLU()).train()
    model = copy.deepcopy(plain)
    rk.convert(model)
    made = calls_of_separable(monkeypatch)
    for ours, theirs in ((model, plain), (model.eval(), plain.eval())):
        torch.testing.assert_close(ours(X), theirs(X))
        for got, want in zip(
            torch.autograd.grad(ours(X).square().sum(), list(ours.parameters())),
            torch.autograd.grad(theirs(X).square().sum(), list(theirs.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)
    assert not made


def test_changed_statistics_are_seen():
    model = network(nn.ReLU())
    rk.convert(model)
    model[1].running_mean.add_(1)
    plain = network(nn.ReLU())
    plain[1].running_mean.add_(1)
    with torch.no_grad():
        torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-5)


def test_copies_and_compiles_whole():
    model = network(nn.ReLU6())
    with torch.no_grad():
        expected = model(X)
        rk.convert(model)
        twin = copy.deepcopy(model)
        del model
        torch.testing.assert_close(twin(X), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            torch.compile(twin, fullgraph=True, backend="eager")(X), expected, rtol=1e-4, atol=1e-5
        )


def test_what_is_not_folded():
    hooked = network(nn.ReLU())
    hooked[1].register_forward_hook(lambda *_: None)
    without_statistics = nn.Sequential(
        nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6, track_running_stats=False), nn.Conv2d(6, 4, 1)
    )
    for model in (hooked, without_statistics, network(nn.Tanh())):
        report = rk.convert(model)
        assert (report.folded, report.depthwise) == ([], ["0"])


def test_an_activation_replaced_is_folded_too():
    model = network(nn.ReLU())
    report = rk.convert(model, activation="trelu")
    assert (len(report.folded), report.activations) == (1, ["2"])
    want = network(rk.TReLU())
    with torch.no_grad():
        torch.testing.assert_close(model(X), want(X), rtol=1e-4, atol=1e-5)
