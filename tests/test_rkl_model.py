"""ResNet-KL and its parts: shapes, the merged multi-scale filter, deployment."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rkl_kernels as rk
from rkl.config import Config
from rkl.network.baselines import create
from rkl.network.blocks import BlockOptions, Gate, MultiScaleDepthwise, MultiScaleSeparable, Skip
from rkl.network.build import build_model
from rkl.network.model import Exits, ResNet, ResNetKL

OPTIONS = [
    BlockOptions(),
    BlockOptions(scale_mode="mixed"),
    BlockOptions(scale_mode="stage", gate="legacy"),
    BlockOptions(scales=(3,), gate="none"),
    BlockOptions(separable=False, scales=(3,), activation="relu"),
]


def settled(model: torch.nn.Module, x: torch.Tensor) -> torch.nn.Module:
    """The model in eval mode, with batch statistics and gains that differ from channel to channel."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval()


@pytest.mark.parametrize("scale_mode", ["sum", "stage", "mixed"])
def test_initial_scales(scale_mode: str) -> None:
    """The sum of squares of a filter is 2 if dense, and 1/3 if depthwise (all scales together) or pointwise."""
    torch.manual_seed(0)
    model = ResNetKL(10, 18, 64, 3, 8, BlockOptions(scale_mode=scale_mode))
    conv = model.stages[2][1].branch[0].conv
    for weight, expected in (
        (conv.depthwise.weight, 1 / 3),
        (conv.pointwise.weight, 1 / 3),
        (model.stages[3][0].shortcut.conv.weight, 2),
    ):
        assert weight.detach().square().flatten(1).sum(1).mean().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize(("size", "deepest"), [(8, 1), (32, 4), (65, 5)])
def test_outputs_in_training_and_eval_mode(depth: int, size: int, deepest: int) -> None:
    model = ResNetKL(7, depth, 4, 2, size)
    x = torch.randn(2, 2, size, size)
    exits = model(x)
    assert isinstance(exits, Exits)
    assert [tuple(t.shape) for t in exits.logits] == [(2, 7)] * 4
    channels = 4 * 8 * (4 if depth == 50 else 1)
    assert [tuple(t.shape) for t in exits.features] == [(2, channels, deepest, deepest)] * 4
    model.eval()
    assert torch.equal(model(x), model.forward_exits(x).logits[-1])


def test_feature_size_is_an_argument() -> None:
    exits = ResNetKL(3, width=4, image_size=32, feature_size=2)(torch.randn(2, 3, 32, 32))
    assert {tuple(t.shape[2:]) for t in exits.features} == {(2, 2)}


def test_the_heads_are_the_configurations() -> None:
    model = build_model(Config(width=4, feature_size=2, exit_gate="none"), 10, 1, 16)
    assert model.feature_size == 2
    assert all(head.gate is None for head in model.exits)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(64, 3, 1), (65, 3, 2), (128, 3, 2), (129, 7, 2)])
def test_the_stem_is_that_of_the_size(size: int, kernel: int, stride: int) -> None:
    """The baseline has the same stem."""
    ours, theirs = ResNet(3, width=8, image_size=size), create("resnet18", 3, image_size=size, width=8)
    for conv in ((ours.stem if size <= 128 else ours.stem[0]).conv, theirs.conv1):
        assert (conv.kernel_size, conv.stride) == ((kernel, kernel), (stride, stride))


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_689_512), (50, 25_557_032)])
def test_plain_resnet_has_the_standard_models_parameters(depth: int, parameters: int) -> None:
    """The parameter counts of torchvision's resnet18 and resnet50."""
    with torch.device("meta"):
        model = ResNet(1000, depth, image_size=224)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("stride", [1, 2])
def test_merged_scales_equal_the_separate_convolutions(stride: int) -> None:
    layer = MultiScaleDepthwise(6, (3, 5, 7), stride).double()
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    branches = [F.conv2d(x, w, None, stride, w.shape[-1] // 2, groups=6) for w in layer.filters]
    with rk.use_backend("reference"):
        y = layer(x)
    torch.testing.assert_close(y, sum(branches), rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(y.sin().sum(), list(layer.filters))
    expected = torch.autograd.grad(sum(branches).sin().sum(), list(layer.filters))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_mixed_scales_give_every_channel_its_own_size() -> None:
    layer = MultiScaleDepthwise(7, (3, 5, 7), 1, mixed=True)
    for channel, weight in enumerate(layer.weight):
        size = (3, 5, 7)[channel % 3]
        assert int((weight != 0).sum()) == size**2
        outer = F.pad(torch.zeros(size, size), ((7 - size) // 2,) * 4, value=1.0).bool()
        assert not weight[0][outer].any()


def test_multi_scale_separable_equals_its_two_steps() -> None:
    layer = MultiScaleSeparable(5, 4, (3, 5), stride=2)
    x = torch.randn(2, 5, 8, 8)
    expected = layer.pointwise(F.conv2d(x, layer.depthwise.weight, None, 2, 2, groups=5))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_gate_range(legacy: bool) -> None:
    """The old form lies in [0.5, 1) and cannot suppress. The new one can."""
    gate = Gate(4, 8, "trelu", legacy)
    norm = gate.expand[0] if legacy else gate.expand.norm
    with torch.no_grad():
        norm.weight.fill_(3)
        norm.bias.fill_(0)
        values = gate(torch.randn(8, 4, 7, 7))
    assert values.shape == (8, 4, 7, 7)
    assert float(values.max()) < 1
    assert (float(values.min()) >= 0.5) == legacy


def test_the_gate_starts_neutral() -> None:
    assert torch.equal(Gate(16, 8, "trelu")(torch.randn(2, 16, 6, 6)), torch.tensor(-3.0).sigmoid().expand(2, 16, 6, 6))


@pytest.mark.parametrize(("depth", "most"), [(18, 0.2), (34, 0.2), (50, 0.75)])
def test_resnet_kl_is_no_larger_than_resnet(depth: int, most: float) -> None:
    """The ratio of parameters of the deployed network to those of the plain one, at the same width."""
    with torch.device("meta"):
        ours, plain = ResNetKL(100, depth), ResNet(100, depth)
    ours.exits = torch.nn.ModuleList()
    assert sum(p.numel() for p in ours.parameters()) <= most * sum(p.numel() for p in plain.parameters())


def test_gradient_of_a_narrow_shortcut() -> None:
    """oneDNN's own gradient crashes here: 1 x 1 at stride 2, channels_last, fewer channels than a vector. Sums of small
    integers are exact."""
    skip = Skip(8, 16, 1, 2, bias=False)
    x = torch.randint(-2, 3, (4, 8, 64, 64)).float()
    with torch.no_grad():
        skip.weight.copy_(torch.randint(-2, 3, skip.weight.shape))
    weight = skip.weight.detach().double().requires_grad_()
    F.conv2d(x.double(), weight, stride=2).square().sum().backward()
    for _ in range(20):
        skip.weight.grad = None
        skip(x.to(memory_format=torch.channels_last)).square().sum().backward()
    assert torch.equal(skip.weight.grad.double(), weight.grad)


def test_models_of_one_seed_share_the_values_of_the_layers_they_share() -> None:
    def values(kind: type[ResNet], **options: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        plain = {"separable": False, "scales": (3,), "activation": "relu", "gate": "none"}
        return kind(5, 18, 8, 3, 16, BlockOptions(**plain | options)).state_dict()

    plain = values(ResNet)
    for other in (values(ResNetKL), values(ResNet, gate="light"), values(ResNet, activation="trelu")):
        assert all(torch.equal(value, other[name]) for name, value in plain.items())
    torch.manual_seed(3)
    first, second = ResNet(5, width=8), ResNet(5, width=8)
    assert not torch.equal(first.stem.conv.weight, second.stem.conv.weight)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("depth", [18, 50])
def test_deployed_model_gives_the_same_outputs(options: BlockOptions, depth: int) -> None:
    x = torch.randn(4, 3, 16, 16)
    model = settled(ResNetKL(5, depth, 8, 3, 16, options), x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model.forward_exits(x).logits
        scale = max(float(logits.abs().max()) for logits in expected)
        torch.testing.assert_close(model.deploy()(x), expected[-1], rtol=1e-4, atol=1e-4 * scale)
        for ours, theirs in zip(model.deploy(exits=True).forward_exits(x).logits, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * scale)
    assert sum(p.numel() for p in model.deploy().parameters()) < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_deployed_plain_resnet_has_no_batch_norm() -> None:
    x = torch.randn(2, 3, 16, 16)
    model = settled(ResNet(5, 18, 8, 3, 16), x)
    deployed = model.deploy()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in deployed.modules())
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 19}, "depth must be one of 18, 34, 50, got 19"),
        ({"image_size": 4}, "image_size must be at least 8"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"feature_size": 0}, "feature_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNetKL(**({"classes": 3, "width": 4} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "gelu"}, "activation must be one of trelu, relu, got 'gelu'"),
        ({"scales": (3, 4)}, "scales must be odd kernel sizes"),
        ({"scales": (3, 5, 7, 9, 11), "scale_mode": "stage"}, "scales must be at most 4 with scale_mode stage"),
        ({"separable": False}, "scales other than 3 need separable convolutions"),
        ({"gate": "yes"}, "gate must be one of none, light, legacy"),
    ],
)
def test_bad_options(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockOptions(**arguments)
