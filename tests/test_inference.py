"""rk.fuse_for_inference gives the same results from fewer layers, and reports what it leaves and why."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from chains import X, assert_same, chain, fill, layers
from torch import nn
from torch.nn.utils import parametrizations, prune

import rkl_kernels as rk
from benchmarks import model_matrix


@pytest.mark.parametrize("inner", [(), (nn.ReLU6,), (nn.SiLU,), (nn.GELU,), (rk.TReLU,), (nn.Dropout, nn.ReLU)])
@pytest.mark.parametrize("settings", [{}, {"bias": True, "stride": 2, "padding_mode": "reflect"}, {"padding": "same"}])
@pytest.mark.parametrize("outer", [(), (nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(inplace=True))], ids=["", "outer"])
def test_a_chain_is_one_layer(inner, settings, outer):
    plain = chain(*(kind() for kind in inner), outer=outer, **settings)
    fused = rk.fuse_for_inference(plain)
    names = tuple(str(i) for i in range(len(plain)))
    assert [tuple(n for n in found) for found in fused.fusion_report.fused] == [names]
    assert not fused.fusion_report.left
    assert copy.deepcopy(fused).fusion_report == pickle.loads(pickle.dumps(fused)).fusion_report == fused.fusion_report
    assert layers(fused) == [rk.SeparableConv2d, rk.DepthwiseConv2d]
    assert_same(fused, plain)


def test_the_model_and_random_numbers_are_untouched():
    plain = chain(nn.ReLU()).train()
    before = copy.deepcopy(plain)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    fused = rk.fuse_for_inference(plain)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert plain.training
    assert [type(m) for m in plain.modules()] == [type(m) for m in before.modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(plain.modules(), before.modules(), strict=True))
    torch.testing.assert_close(plain.state_dict(), before.state_dict(), rtol=0, atol=0)
    assert all(p.requires_grad for p in plain.parameters())
    assert not any(p.requires_grad for p in fused.parameters())
    plain[0].weight.data.zero_()
    assert_same(fused, before.eval())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_may_be_made_in_any_mode(mode):
    plain = chain(nn.ReLU())
    with mode():
        fused = rk.fuse_for_inference(plain)
        made_there = rk.fuse_for_inference(copy.deepcopy(plain))
    for one in (fused, made_there):
        assert one.fusion_report.fused == [("0", "1", "2", "3")]
        assert_same(one, plain)


def test_hooks_of_all_modules_keep_everything_as_it_is():
    plain = chain(nn.ReLU())
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert "hooks are registered for all modules" in rk.fuse_for_inference(plain).fusion_report.left["0"]
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "groups": 2, "bias": False}, {"padding": "same", "dilation": 2}]
)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_norms_after_other_convolutions_are_folded(norm, settings):
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 6, 3, **{"padding": 1, "padding_mode": "reflect"} | settings), norm(6, eps=0.5), nn.Hardswish()
    plain = fill(nn.Sequential(*dense, *chain(nn.ReLU()))).eval()
    fused = rk.fuse_for_inference(plain)
    assert fused.fusion_report.folded == [("0", "1")]
    assert fused.fusion_report.fused == [("3", "4", "5", "6")]
    assert "norms folded into other convolutions: 1" in str(fused.fusion_report)
    assert layers(fused) == [rk.SeparableConv2d, rk.DepthwiseConv2d]
    assert_same(fused, plain)


@pytest.mark.parametrize("inner", [nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.GELU(), rk.TReLU()])
@pytest.mark.parametrize("settings", [{}, {"bias": True, "stride": 2, "padding_mode": "reflect"}, {"padding": "same"}])
def test_a_lone_depthwise_layer_activates(inner, settings):
    plain = nn.Sequential(*chain(inner, **settings)[:3], nn.AvgPool2d(2)).eval()
    fused = rk.fuse_for_inference(plain)
    assert fused.fusion_report.fused == [("0", "1", "2")]
    assert_same(fused, plain)
    assert_same(fused, plain, X.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("inner", [nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), rk.TReLU()])
def test_a_dense_layer_activates(inner):
    torch.manual_seed(0)
    plain = fill(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), inner, *chain())).eval()
    fused = rk.fuse_for_inference(plain)
    assert fused.fusion_report.folded == [("0", "1", "2")]
    assert_same(fused, plain)


class ReadTwice(nn.Module):
    """Its norm is not the only layer that reads the convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.chain = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), chain(nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.chain(x + self.norm(x))


def hooked(model: ReadTwice) -> nn.Module:
    model.conv.register_forward_hook(lambda module, inputs, output: output + 1)
    return nn.Sequential(model.conv, model.norm, model.chain)


KEPT_NORMS = {
    "read twice": lambda model: model,
    "hooked": hooked,
    "a subclass": lambda model: nn.Sequential(type("Own", (nn.Conv2d,), {})(6, 6, 1), model.norm, model.chain),
    "batch statistics": lambda model: nn.Sequential(
        model.conv, nn.BatchNorm2d(6, track_running_stats=False), model.chain
    ),
}


@pytest.mark.parametrize("name", KEPT_NORMS)
def test_norms_that_are_not_folded(name):
    torch.manual_seed(0)
    plain = KEPT_NORMS[name](fill(ReadTwice())).eval()
    fused = rk.fuse_for_inference(plain)
    assert not fused.fusion_report.folded
    assert len(fused.fusion_report.fused) == 1
    assert_same(fused, plain)


def test_a_dense_filter_too_large_for_its_type_keeps_its_norm():
    plain = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), *chain(nn.ReLU())).eval().half()
    plain[1].running_var.fill_(0)
    plain[1].weight.data.fill_(60000)
    fused = rk.fuse_for_inference(plain)
    assert not fused.fusion_report.folded
    torch.testing.assert_close(fused(X.half()), plain(X.half()), equal_nan=True)


def frozen(channels: int) -> nn.Module:
    return pytest.importorskip("torchvision.ops", reason="extra [train] not installed").FrozenBatchNorm2d(channels)


def timms(name: str, act: type[nn.Module] = nn.ReLU):
    def build(channels: int) -> nn.Module:
        norms = pytest.importorskip("timm.layers.norm_act", reason="extra [train] not installed")
        return getattr(norms, name)(channels, act_layer=act)

    return build


def timms_synchronized(channels: int) -> nn.Module:
    norms = pytest.importorskip("timm.layers.norm_act", reason="extra [train] not installed")
    return norms.convert_sync_batchnorm(timms("BatchNormAct2d")(channels))


NORMS = {"SyncBatchNormAct": timms_synchronized, "SyncBatchNorm": nn.SyncBatchNorm, "FrozenBatchNorm2d": frozen} | {
    name: timms(name) for name in ("BatchNormAct2d", "FrozenBatchNormAct2d")
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_other_kinds(name):
    plain = chain(norm=NORMS[name])
    fused = rk.fuse_for_inference(plain)
    assert type(plain[1]).__name__ == name
    assert fused.fusion_report.fused == [("0", "1", "2")]
    assert_same(fused, plain)


def test_a_norm_without_statistics_is_left():
    plain = chain(norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    fused = rk.fuse_for_inference(plain)
    assert not fused.fusion_report.fused
    assert "follows it, but BatchNorm2d" in fused.fusion_report.left["0"]
    assert_same(fused, plain)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, timms("BatchNormAct2d", nn.Hardswish)])
def test_an_activation_that_no_operator_has_stays(norm):
    plain = chain(nn.Hardswish(), norm=norm)
    fused = rk.fuse_for_inference(plain)
    assert fused.fusion_report.fused == [("0", "1")]
    assert layers(fused) == [rk.DepthwiseConv2d]
    assert_same(fused, plain)


def hook(model):
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)


def own_forward(model):
    model[2].forward = lambda x: x * 2


def other_bounds(model):
    model[2] = nn.ReLU6()
    model[2].max_val = 0.5


ALTERED = {
    "a hook": hook,
    "relu6 of other bounds": other_bounds,
    "a forward of its own": own_forward,
    "pruned depthwise": lambda model: prune.l1_unstructured(model[0], "weight", amount=0.5),
    "pruned pointwise": lambda model: prune.l1_unstructured(model[3], "weight", amount=0.5),
    "padded pointwise": lambda model: setattr(model[3], "padding", (1, 1)),
    "parametrized": lambda model: parametrizations.weight_norm(model[3]),
    "weight norm by hook": lambda model: nn.utils.weight_norm(model[0]),
    "gelu by tanh": lambda model: model.__setitem__(2, nn.GELU(approximate="tanh")),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("name", ALTERED)
def test_altered_layers_keep_their_work(name):
    plain = chain(nn.ReLU())
    ALTERED[name](plain)
    fused = rk.fuse_for_inference(plain)
    assert not any(len(names) == 4 for names in fused.fusion_report.fused)
    torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_filter_too_large_for_its_type_is_left():
    plain = chain(nn.ReLU()).half()
    plain[1].weight.data.fill_(60000)
    plain[1].running_var.fill_(0)
    fused = rk.fuse_for_inference(plain)
    assert not fused.fusion_report.fused
    torch.testing.assert_close(fused(X.half()), plain(X.half()), equal_nan=True)


def test_a_hook_on_a_container_sees_what_it_saw():
    plain = nn.Sequential(chain(nn.ReLU()), nn.Conv2d(4, 6, 1), chain(nn.SiLU()))
    seen = []
    plain[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    fused = rk.fuse_for_inference(plain)
    assert len(fused.fusion_report.fused) == 2
    assert_same(fused, plain)
    assert len(seen) == 4
    assert len(set(seen)) == 1


def test_what_a_copy_refuses():
    fused = rk.fuse_for_inference(chain(nn.ReLU()))
    with pytest.raises(ValueError, match="mode must be False for a model fused for inference, got True"):
        fused.train()
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
        fused([X])
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got Tensor"):
        rk.fuse_for_inference(X)
    assert "chains fused: 1, of 4 layers" in str(fused.fusion_report)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_copies_saves_traces_and_compiles():
    plain = chain(nn.ReLU6())
    fused = rk.fuse_for_inference(plain)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(fused, X)
    for one in (
        copy.deepcopy(fused),
        torch.load(file, weights_only=False),
        traced,
        torch.fx.symbolic_trace(fused),
        torch.compile(fused, fullgraph=True, backend="eager"),
        torch.export.export(fused, (X,)).module(),
        rk.fuse_for_inference(fused),
    ):
        torch.testing.assert_close(one(X), plain(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_types(dtype):
    plain = chain(nn.ReLU()).to(dtype)
    fused = rk.fuse_for_inference(plain)
    exact, x = copy.deepcopy(plain).double(), X.to(dtype)
    want = exact(x.double())
    ours, theirs = (float((model(x).double() - want).detach().abs().max()) for model in (fused, plain))
    assert fused(x).dtype == dtype
    assert ours <= 2 * theirs + 1e-12


def test_a_shared_pointwise_layer():
    shared = nn.Conv2d(6, 6, 1)
    plain = nn.Sequential(chain(nn.ReLU()), nn.Conv2d(4, 6, 1), chain(nn.ReLU())).eval()
    plain[0][3] = plain[2][3] = shared
    plain[1] = nn.ReLU()
    fused = rk.fuse_for_inference(plain)
    assert len(fused.fusion_report.fused) == 2
    assert_same(fused, plain)


MODELS = {
    "torchvision mobilenet_v2": (17, 85),
    "torchvision mobilenet_v3_small": (11, 29),
    "torchvision shufflenet_v2_x0_5": (19, 95),
    "timm convnext_atto": (0, 0),
    "timm mobilenetv2_100": (17, 102),
    "timm legacy_xception": (34, 124),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_of_the_table_of_models(name):
    builders = dict(model_matrix.candidates())
    if name not in builders:
        pytest.skip("extra [train] not installed")
    row = model_matrix.examine(name, builders[name])
    assert (row.chains, row.layers) == MODELS[name]
    assert row.swapped == row.depthwise
    of_pytorch = row.errors.pop("PyTorch")
    for output, gradients in row.errors.values():
        assert output <= 4 * of_pytorch[0]
        assert gradients is None or gradients <= 4 * of_pytorch[1]


class Changing(nn.Module):
    """A model that changes its chain for a call and then restores it."""

    def __init__(self, how):
        super().__init__()
        self.chain, self.how = chain(nn.ReLU()), how

    def forward(self, x):
        if self.how == "functional call":
            doubled = {name: 2 * value for name, value in self.chain.named_parameters()}
            return torch.func.functional_call(self.chain, doubled, (x,))
        if self.how == "training norm":
            self.chain[1].train()
            y = self.chain(x)
            self.chain[1].eval()
            return y
        handle = self.chain[2].register_forward_hook(lambda module, inputs, output: output * 2)
        y = self.chain(x)
        handle.remove()
        return y


@pytest.mark.parametrize("how", ["functional call", "training norm", "hook"])
def test_what_a_forward_changes_for_a_call_counts(how):
    plain = Changing(how).eval()
    fused = rk.fuse_for_inference(plain)
    for model in (fused, copy.deepcopy(fused), copy.deepcopy(fused).double()):
        x = X.to(next(model.parameters()).dtype)
        torch.testing.assert_close(model(x).float(), copy.deepcopy(plain)(X), rtol=1e-4, atol=1e-4)


def test_fused_copies_are_in_inference_mode():
    fused = rk.fuse_for_inference(chain(nn.ReLU()))
    assert not any(m.training for m in fused.modules())
    torch.jit.freeze(torch.jit.trace(fused, X))


@pytest.mark.parametrize(
    ("model", "chains"),
    [
        (nn.ModuleList([chain(nn.ReLU())]), 1),
        (nn.ModuleDict({"a": chain(nn.ReLU())}), 1),
        (nn.DataParallel(chain(nn.ReLU())), 1),
        (nn.Conv2d(8, 8, 3, groups=8), 0),
        (rk.DepthwiseConv2d(8, 3), 0),
        (rk.SeparableConv2d(8, 4, 3), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_is_a_layer_or_a_container(model, chains):
    fused = rk.fuse_for_inference(model)
    assert len(fused.fusion_report.fused) == chains
    assert not fused.training
    assert type(fused) is (rk.DepthwiseConv2d if type(model) is nn.Conv2d else type(model))
