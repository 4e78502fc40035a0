"""rk.convert and rk.restore keep a model's results, whatever the model is and whatever is done to it later."""

from __future__ import annotations

import copy
import io
import random
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, parametrize, prune

import rkl_kernels as rk

X = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0))


def pair() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1))


def assert_alike(ours: nn.Module, theirs: nn.Module) -> None:
    """Outputs agree, and so do the gradients of every parameter."""
    results = []
    for model in (ours, theirs):
        model.zero_grad()
        y = model(X)
        if y.requires_grad:
            y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


class Kept(nn.Module):
    """Has a flag, a tap, a loop over a ModuleList, a pointwise layer with two parents, and a part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([pair(), pair()])
        self.blocks[1][1] = self.blocks[0][1]
        self.register_buffer("calls", torch.zeros(()))
        self.tapped = self.without = False

    def forward(self, x):
        self.calls += 1
        for block in self.blocks:
            with torch.set_grad_enabled(not self.without):
                middle = block[0](x)
            x = middle if self.tapped else block[1](middle)
        return x


def test_everything_stays_the_same_object():
    model = Kept()
    modules, tensors, keys = list(model.modules()), list(model.parameters()), list(model.state_dict())
    states = torch.get_rng_state(), random.getstate()
    report = rk.convert(model)
    assert report.depthwise == ["blocks.0.0", "blocks.1.0"]
    assert not report.left
    assert str(report) == "depthwise convolutions swapped: 2; activations replaced: 0"
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), tensors, strict=True))
    assert list(model.state_dict()) == keys
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(isinstance(block[0], rk.DepthwiseConv2d) for block in model.blocks)


@pytest.mark.parametrize("flag", ["tapped", "without"])
def test_a_forward_may_change_its_mind(flag):
    model, plain = Kept(), Kept()
    rk.convert(model)
    assert_alike(model, plain)
    for one in (model, plain):
        setattr(one, flag, True)
    assert_alike(model, plain)


def prune_pointwise(model):
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    prune.l1_unstructured(model[0], "weight", amount=0.5)


class Low(nn.Module):
    """A low-rank addition around a layer."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(1)
        self.base, self.down, self.up = base, nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def own_forward(model):
    was = model[1].forward
    model[1].forward = lambda x: was(x) * 2


def normalize(model):
    torch.manual_seed(2)
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[1]).eval()


DONE = {
    "pruned": prune_pointwise,
    "wrapped": lambda model: model.__setitem__(1, Low(model[1])),
    "depthwise wrapped": lambda model: model.__setitem__(0, Low(model[0])),
    "replaced": lambda model: model.__setitem__(1, nn.Identity()),
    "forward on the object": own_forward,
    "hooked": lambda model: model[0].register_forward_hook(lambda module, inputs, output: output + 1) and None,
    "sliced": lambda model: model.__delitem__(1),
    "parametrized": normalize,
    "in float64": lambda model: model.double().float(),
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", DONE)
def test_what_is_done_to_layers_before_or_after(name, before):
    model, plain = pair(), pair()
    DONE[name](plain)
    if before:
        DONE[name](model)
    rk.convert(model)
    if not before:
        DONE[name](model)
    assert_alike(model, plain)
    rk.restore(model)
    assert_alike(model, plain)
    assert not any(isinstance(module, rk.DepthwiseConv2d) for module in model.modules())


def test_parametrizations_can_be_removed_afterwards():
    model = pair()
    parametrizations.weight_norm(model[0])
    rk.convert(model)
    twin = copy.deepcopy(model)
    rk.restore(model)
    for one, kind in ((model, nn.Conv2d), (twin, rk.DepthwiseConv2d)):
        parametrize.remove_parametrizations(one[0], "weight")
        assert type(one[0]) is kind
    assert_alike(model, twin)


def test_batch_norm_folded_by_pytorch():
    model = nn.Sequential(*pair()[:1], nn.BatchNorm2d(4)).eval()
    model[1].running_mean.normal_()
    plain = fuse_conv_bn_eval(model[0], model[1])
    rk.convert(model)
    torch.testing.assert_close(fuse_conv_bn_eval(model[0], model[1])(X), plain(X))


def test_data_parallel_replicas():
    model = pair()
    rk.convert(model)
    replica = model[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = model[0].weight * 2, model[0].bias * 2
    torch.testing.assert_close(replica(X), 2 * model[0](X))


def test_copied_saved_and_restored():
    model = pair()
    before = [type(module) for module in model.modules()]
    rk.convert(model)
    assert not rk.convert(model).depthwise
    assert not rk.convert(model).left
    twin = copy.deepcopy(model)
    twin[1].weight.data.zero_()
    torch.testing.assert_close(twin(X), twin[1].bias[:, None, None].expand(2, 4, 7, 6))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for one in (model, twin, loaded):
        assert rk.restore(one) == ["0"]
        assert rk.restore(one) == []
        assert [type(module) for module in one.modules()] == before
        assert all(vars(module).keys() == vars(nn.Conv2d(4, 4, 1)).keys() for module in one)
    assert_alike(loaded, pair())
    assert_alike(model, pair())


def test_restore_leaves_layers_that_were_built():
    model = nn.Sequential(rk.DepthwiseConv2d(4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU())
    rk.convert(model, activation="trelu")
    assert rk.restore(model) == ["1", "2"]
    assert [type(layer) for layer in model] == [rk.DepthwiseConv2d, nn.Conv2d, nn.ReLU]


def test_a_layer_alone():
    layer = nn.Conv2d(4, 4, 3, groups=4, padding_mode="reflect", padding=1)
    want = layer(X)
    assert rk.convert(layer).depthwise == [""]
    torch.testing.assert_close(layer(X), want)


class Same(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def test_what_is_left_and_why():
    model = nn.ModuleDict(
        {
            "multiplied": nn.Conv2d(4, 8, 3, groups=4),
            "subclass": Same(4, 4, 2, groups=4),
            "own": nn.Conv2d(4, 4, 3, groups=4),
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "plain": nn.Conv2d(1, 1, 3),
            "reflected": nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
        }
    )
    model["own"].forward = lambda x: x
    report = rk.convert(model)
    assert report.depthwise == ["reflected"]
    assert list(report.left) == ["multiplied", "subclass", "own"]
    assert "2 filters a channel" in report.left["multiplied"]
    assert "Same is a subclass of nn.Conv2d" in report.left["subclass"]
    assert "left own: its forward, or what that calls, was replaced" in str(report)


def test_a_lazy_layer_is_left_until_its_first_call():
    model = nn.Sequential(nn.LazyConv2d(4, 3, groups=4))
    assert rk.convert(model).left == {"0": "its channels are known only after its first call; convert it again then"}
    model(X)
    assert rk.convert(model).depthwise == ["0"]


def test_activations_on_request():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU())
    model[2].forward = torch.abs
    report = rk.convert(model, activation="trelu")
    assert report.activations == ["0"]
    assert isinstance(model[0], rk.TReLU)
    assert model[0].inplace


@pytest.mark.parametrize("name", ["repghostnet_050", "coat_tiny", "tf_mobilenetv3_small_minimal_100", "convnext_tiny"])
def test_known_models(name):
    timm = pytest.importorskip("timm", reason="extra [train] not installed")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).eval()
    size = 224 if name == "coat_tiny" else 64
    x = torch.randn(1, 3, size, size)
    depthwise = sum(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules())
    with torch.no_grad():
        expected = model(x)
        report = rk.convert(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    assert len(report.depthwise) + len(report.left) == depthwise > 0
    assert all("Conv2dSame" in why for why in report.left.values())
    assert bool(report.left) == (name == "tf_mobilenetv3_small_minimal_100")


def circular(layer):
    """Pad by replacing a method of the layer, as programs that make tiling images do."""

    def forward(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, groups=self.groups)

    layer._conv_forward = types.MethodType(forward, layer)


def test_a_replaced_method_is_what_counts():
    x = torch.randn(2, 8, 9, 9)
    before, after = (nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2))
    circular(before)
    want = before(x)
    assert rk.convert(before).left == {"": "its forward, or what that calls, was replaced"}
    assert torch.equal(before(x), want)
    rk.convert(after)
    circular(after)
    after.load_state_dict(before.state_dict())
    assert torch.equal(after(x), want)
    both = rk.SeparableConv2d(8, 4, 3, padding=1)
    with torch.no_grad():
        plain = both(x)
        circular(both.depthwise)
        assert not torch.allclose(both(x), plain)


@pytest.mark.parametrize(("owner", "name"), [(nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (F, "conv2d")])
def test_what_is_replaced_in_pytorch_is_what_counts(monkeypatch, owner, name):
    model, plain, both = pair(), pair(), rk.SeparableConv2d(8, 4, 3)
    rk.convert(model)
    inner, x = getattr(owner, name), torch.randn(1, 8, 5, 5)
    alone = both(x)
    monkeypatch.setattr(owner, name, lambda *args, **settings: inner(*args, **settings) * 2)
    assert_alike(model, plain)
    assert not torch.allclose(both(x), alone)
    assert rk.fuse_for_inference(plain).fusion_report.fused == []


def test_a_method_of_a_subclass_is_what_counts():
    class Doubled(rk.DepthwiseConv2d):
        def _conv_forward(self, *args):
            return super()._conv_forward(*args) * 2

    torch.manual_seed(3)
    ours = Doubled(4, 3, padding=1)
    torch.testing.assert_close(ours(X), F.conv2d(X, ours.weight, ours.bias, padding=1, groups=4) * 2)


def test_a_layer_made_dense_afterwards():
    model = pair()
    rk.convert(model)
    layer = model[0]
    layer.groups, layer.weight = 1, nn.Parameter(torch.randn(4, 4, 3, 3))
    torch.testing.assert_close(layer(X), F.conv2d(X, layer.weight, layer.bias, padding=1))
    layer.groups = 2
    with pytest.raises(RuntimeError, match="expected input"):
        layer(X)


def test_classes_made_for_a_layer_outlast_restore():
    class Sharded:
        def unshard(self):
            return type(self).__mro__

    model, plain = pair(), pair()
    rk.convert(model)
    layer = model[0]
    layer.__class__ = type("ShardedDepthwiseConv2d", (Sharded, type(layer)), {})  # as fully_shard does
    assert rk.restore(model) == ["0"]
    assert rk.DepthwiseConv2d not in layer.unshard()
    assert nn.Conv2d in layer.unshard()
    assert_alike(model, plain)


def test_a_transformer_that_is_not_swapped_keeps_its_flags():
    model = nn.TransformerEncoderLayer(16, 2, 32, 0.0, nn.ReLU(), batch_first=True)
    model.activation_relu_or_gelu = 0  # no fast path
    rk.convert(model)
    rk.restore(model)
    assert model.activation_relu_or_gelu == 0


def test_a_transformer_computes_the_replaced_activation_in_inference_too():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, 0.0, nn.ReLU(), batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    plain = model(x)
    rk.convert(model, activation="trelu")
    want = model(x)
    assert not torch.allclose(want, plain)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want)
    rk.restore(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_stack_of_transformer_layers_takes_a_padding_mask_in_inference():
    """PyTorch's stack makes nested tensors for such a call, which T-ReLU does not take."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, nn.ReLU(), batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=mask)
    for _ in range(2):
        rk.convert(model, activation="trelu")
    want = model(x, src_key_padding_mask=mask)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), want)
    rk.restore(model.layers[0])
    assert not model.use_nested_tensor
    rk.restore(model)
    assert model.use_nested_tensor
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), plain)


def test_converted_layers_take_pytorchs_keyword():
    x = torch.randn(2, 8, 9, 9)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU())
    want = model[1](input=model[0](input=x))
    rk.convert(model)
    torch.testing.assert_close(model[1](input=model[0](input=x)), want)
    assert torch.equal(rk.TReLU()(input=x), rk.trelu(x))


def test_hooks_of_all_modules_see_the_parts_of_a_separable_layer():
    seen = []
    layer, x = rk.SeparableConv2d(8, 4, 3), torch.randn(1, 8, 5, 5)
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert seen == [layer.depthwise, layer.pointwise, layer]
