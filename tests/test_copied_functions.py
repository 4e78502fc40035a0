"""Functions set on a model, as a hook or a method. In a fused copy they refer to the copy."""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType

import pytest
import torch
from chains import X, chain
from torch import nn

import rkl_kernels as rk


def test_a_forward_set_on_the_model_is_the_copys_own():
    plain = chain(nn.ReLU(), norm=nn.BatchNorm2d).train()
    inner = plain.forward
    plain.forward = lambda x, scale=2: inner(x) * scale
    fused = rk.fuse_for_inference(plain)
    before = copy.deepcopy(plain.state_dict())
    assert torch.equal(fused(X), fused(X))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, before[key]), key
    torch.testing.assert_close(fused(X), nn.Sequential(*plain).eval()(X) * 2)


class Gated(nn.Module):
    """Has a norm that a function set on the model calls. Its further argument keeps it from being traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate = chain(nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def head(self, x):
        return x

    def forward(self, x, scale=1):
        return self.head(self.body(x)) * scale


def by_a_hook(model: Gated) -> None:
    model.body.register_forward_hook(lambda module, inputs, output: output * model.gate(output))


def by_a_method(model: Gated) -> None:
    model.head = MethodType(lambda self, x: model.gate(x), model)


def by_a_function(model: Gated) -> None:
    model.head = lambda x: model.gate(x)


def by_a_list(model: Gated) -> None:
    parts = [model.body, (model.gate,)]
    model.forward = lambda x, scale=1: parts[1][0](parts[0](x)) * scale


def by_a_dict(model: Gated) -> None:
    parts = {"gate": model.gate, "was": model.forward}
    parts["again"] = lambda x: parts["gate"](parts["was"](x))
    model.forward = lambda x, scale=1: parts["again"](x) * scale


def by_a_partial(model: Gated) -> None:
    gate = model.gate
    model.head = partial(lambda scale, x: gate(x) * scale, 2)


def by_a_weight(model: Gated) -> None:
    """Each call writes to the weight."""
    weight = model.gate[0].weight

    def head(x):
        with torch.no_grad():
            weight.fill_(float(x.mean()))
        return model.gate(x)

    model.head = head


@pytest.mark.parametrize(
    "how", [by_a_hook, by_a_method, by_a_function, by_a_list, by_a_dict, by_a_partial, by_a_weight],
    ids=lambda how: how.__name__,
)  # fmt: skip
def test_what_functions_on_a_model_refer_to_is_the_copys_own(how):
    plain = Gated().train()
    how(plain)
    before = copy.deepcopy(plain.state_dict())
    fused = rk.fuse_for_inference(plain)
    assert fused.fusion_report.fused == [("body.0", "body.1", "body.2", "body.3")]
    ours = fused(X), fused(X, 2)
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)
    plain.eval()
    torch.testing.assert_close(ours, (plain(X), plain(X, 2)), rtol=1e-4, atol=1e-4)


def test_what_is_not_the_models_is_shared():
    seen = []
    plain = Gated().eval()
    plain.body.register_forward_hook(lambda module, inputs, output: seen.append((plain, output.shape)))
    handle = plain.gate.register_forward_hook(lambda module, inputs, output: plain.gate[0](output))
    plain.handle = handle
    fused = rk.fuse_for_inference(plain)
    fused(X)
    assert [where for where, _ in seen] == [fused]
    fused.handle.remove()
    assert not fused.gate._forward_hooks
    assert plain.gate._forward_hooks
