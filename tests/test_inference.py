"""rk.fuse_for_inference: the same results from fewer layers, and everything that is left, with why."""

from __future__ import annotations

import copy
import io
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import rkl_kernels as rk
from benchmarks import model_matrix

X = torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(1))


def fill(module: nn.Module) -> nn.Module:
    """Statistics and parameters of norms that are not 0 and 1."""
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


def assert_same(fused: nn.Module, plain: nn.Module, x: torch.Tensor = X) -> None:
    """In inference, to float32's rounding of outputs and of the image's gradient."""
    results = []
    for model in (fused, plain):
        image = x.clone().requires_grad_()
        y = model(image)
        (grad,) = torch.autograd.grad(y.square().sum(), image)
        with torch.no_grad():
            results.append((y.detach(), grad, model(x)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def layers(model: nn.Module) -> list[type[nn.Module]]:
    return [type(m) for m in model.modules() if isinstance(m, (rk.SeparableConv2d, rk.DepthwiseConv2d, nn.BatchNorm2d))]


@pytest.mark.parametrize("inner", [(), (nn.ReLU6,), (nn.SiLU,), (nn.GELU,), (rk.TReLU,), (nn.Dropout, nn.ReLU)])
@pytest.mark.parametrize("settings", [{}, {"bias": True, "stride": 2, "padding_mode": "reflect"}, {"padding": "same"}])
@pytest.mark.parametrize("outer", [(), (nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(inplace=True))], ids=["", "outer"])
def test_a_chain_is_one_layer(inner, settings, outer):
    plain = chain(*(kind() for kind in inner), outer=outer, **settings)
    fused = rk.fuse_for_inference(plain)
    names = tuple(str(i) for i in range(len(plain)))
    assert [tuple(n for n in found) for found in fused.fusion_report.fused] == [names]
    assert not fused.fusion_report.left
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


ALTERED = {
    "a hook": hook,
    "a forward of its own": own_forward,
    "pruned depthwise": lambda model: prune.l1_unstructured(model[0], "weight", amount=0.5),
    "pruned pointwise": lambda model: prune.l1_unstructured(model[3], "weight", amount=0.5),
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


class Block(nn.Module):
    """Layers as attributes, and a forward that a test chooses."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.dw, self.bn, self.act, self.pw = chain(nn.ReLU())
        self.tail = chain(nn.ReLU(), norm=nn.BatchNorm2d)
        self.tail[3] = nn.Conv2d(6, 6, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.way = [], forward
        self.back = nn.Conv2d(4, 6, 1)

    def straight(self, x):
        return self.pw(self.act(self.bn(self.dw(x))))

    def forward(self, x):
        return self.tail(self.back(self.way(self, x)))


def tapped(self, x):
    middle = self.dw(x)
    return self.pw(self.act(self.bn(middle))) + middle.mean()


def in_place_between(self, x):
    x = x * 1
    middle = self.dw(x)
    x.add_(1)
    return self.pw(self.act(self.bn(middle))) + x.mean()


def test_an_image_changed_in_place_between():
    plain = Block(in_place_between).eval()
    fused = rk.fuse_for_inference(plain)
    assert ("dw", "bn", "act", "pw") in fused.fusion_report.fused
    with torch.no_grad():
        torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-4)


def twice(self, x):
    return self.straight(x) + self.straight(x + 1)


def without_gradients(self, x):
    with torch.no_grad():
        y = self.dw(x)
    return self.pw(self.bn(y)) + x.mean()


def counting(self, x):
    self.calls += 1
    return self.straight(x) * self.calls


def remembering(self, x):
    self.seen.append(x)
    return self.straight(x)


def drawing(self, x):
    random.random()
    return self.straight(x) + torch.randn(1) * 0


def asking_for_data(self, x):
    return self.straight(x) if x.sum() > 0 else self.straight(-x)


def asking_for_gradients(self, x):
    return self.straight(x) if torch.is_grad_enabled() else self.pw(self.act(self.bn(self.dw(x))))


def asking_for_type(self, x):
    return self.straight(x if isinstance(x, torch.Tensor) else x[0])


def asking_for_a_result(self, x):
    y = self.straight(x)
    return y if isinstance(y, torch.Tensor) else y[0]


def by_reference(self, x):
    with rk.use_backend("reference"):
        return self.straight(x)


WAYS = {
    Block.straight: "",
    twice: "",
    asking_for_type: "asks for the type",
    asking_for_gradients: "",
    tapped: "read 2 times",
    without_gradients: "gradient mode",
    by_reference: "backend",
    counting: "changes the module",
    remembering: "changes the module",
    drawing: "random numbers",
    asking_for_data: "cannot be used",
    asking_for_a_result: "asks for the type",
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_forwards_that_can_be_read_and_that_cannot(way):
    plain = Block(way).eval()
    fused = rk.fuse_for_inference(plain)
    told = fused.fusion_report
    assert ("tail.0", "tail.1", "tail.2", "tail.3") in told.fused
    if WAYS[way]:
        assert list(told.left) == ["dw"]
        assert WAYS[way].lower() in told.left["dw"].lower()
    else:
        assert ("dw", "bn", "act", "pw") in told.fused
        assert isinstance(fused, torch.fx.GraphModule)
    torch.manual_seed(5)
    assert_same(fused, plain)
    assert len(plain.seen) == len(getattr(fused, "seen", plain.seen))


def test_what_depends_on_gradients_is_left():
    plain = Block(lambda self, x: self.straight(x) * (2 if torch.is_grad_enabled() else 1)).eval()
    fused = rk.fuse_for_inference(plain)
    assert "whether gradients are recorded" in fused.fusion_report.left["dw"]
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-4)


class Sizes(nn.Module):
    """Takes a size, no tensor: PyTorch's C++ must not take its stand-in for one."""

    def forward(self, shape):
        return torch.zeros(shape)


class WithSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.sizes = chain(nn.ReLU()), Sizes()

    def forward(self, x):
        return self.body(x) + self.sizes((4, 9, 7))


def test_a_module_that_takes_no_tensor():
    plain = WithSizes().eval()
    fused = rk.fuse_for_inference(plain)
    assert len(fused.fusion_report.fused) == 1
    assert_same(fused, plain)


class Flagged(nn.Module):
    """Takes a flag, and takes its blocks apart."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(nn.ReLU())

    def forward(self, x, apart=False):
        if not apart:
            return self.body(x)
        return [x := layer(x) for layer in self.body]


def test_a_sequential_in_code_that_cannot_be_read():
    plain = Flagged().eval()
    fused = rk.fuse_for_inference(plain)
    assert fused.fusion_report.fused == [("body.0", "body.1", "body.2", "body.3")]
    assert type(fused) is Flagged
    assert isinstance(fused.body, nn.Sequential)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_same(fused, plain)
    torch.testing.assert_close(fused(X, True), plain(X, True))
    twin = copy.deepcopy(fused).double()
    torch.testing.assert_close(twin(X.double()), plain.double()(X.double()), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="cannot load weights"):
        fused.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="mode must be False"):
        fused.train()


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
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got list"):
        fused([X])
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got Tensor"):
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
    "torchvision mobilenet_v3_small": (11, 28),
    "torchvision shufflenet_v2_x0_5": (19, 95),
    "torchvision convnext_tiny": (0, 0),
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
