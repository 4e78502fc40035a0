"""Every baseline: unmodified it has the published size, and it trains at the paper's image sizes."""

import pytest
import torch

from rkl.network import baselines
from rkl.network.baselines import BASELINES, create
from rkl.network.deployed import deployed
from rkl.network.replknet import RepLKNet
from rkl.training.evaluation import size_of

# Parameter counts for 1,000 classes as torchvision (metadata of the weights) and timm (tables of results) publish them.
PUBLISHED = {
    "alexnet": 61_100_840,
    "vgg": 138_365_992,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "densenet": 7_978_856,
    "googlenet": 6_624_904,
    "mobilenet": 4_231_976,
    "shufflenet": 2_278_604,
    "xception": 22_855_952,
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def on_meta(monkeypatch):
    """Build the large models without memory, since only their shapes are needed."""
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda self, *, device: self)
    monkeypatch.setattr(baselines, "_initialise", lambda module: None)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_standard_model_has_the_published_parameters(name):
    assert parameters(create(name, classes=1000)) == PUBLISHED[name]


def test_replknet_31b_has_the_published_79_86_million_parameters():
    with torch.device("meta"):
        model = RepLKNet(1000, channels=(128, 256, 512, 1024), blocks=(2, 2, 18, 2))
    assert round(parameters(model) / 1e6, 2) == 79.86  # mmpretrain, configs/replknet


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", BASELINES)
def test_a_deployed_baseline_has_its_norms_folded(name):
    """The comparison with ResNet-KL is then fair, as its norms are folded too. Norms stay where no convolution comes
    right before them."""
    torch.manual_seed(0)
    model, x = create(name, classes=4, image_size=32, width=8).double(), torch.randn(3, 3, 32, 32).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.running_var):
                values.uniform_(0.5, 2)
            for values in (module.bias.data, module.running_mean):
                values.normal_()
    found = deployed(model)
    assert model.training
    assert not found.training
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in found.modules())
    assert norms == {"densenet": 62, "replknet": 25}.get(name, 0)
    expected = model.eval()(x).detach()
    torch.testing.assert_close(found(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    sizes = size_of(model, x)
    assert sizes["deployed_parameters"] == parameters(found) <= sizes["parameters"] == parameters(model)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("image_size", [16, 28, 32, 96])
@pytest.mark.parametrize("name", BASELINES)
def test_a_training_step_lowers_the_loss(name, image_size):
    torch.manual_seed(0)
    channels = 1 if image_size == 28 else 3
    model = create(name, classes=4, in_channels=channels, image_size=image_size, width=8)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the same function before and after the step
    x, labels = torch.randn(4, channels, image_size, image_size), torch.arange(4)

    def loss():
        logits = model(x)
        assert logits.shape == (4, 4)
        return torch.nn.functional.cross_entropy(logits, labels)

    before = loss()
    before.backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    with torch.no_grad():  # a step down the gradient, so short that to first order the loss falls by a hundredth
        squared = sum(p.grad.square().sum() for p in model.parameters())
        for p in model.parameters():
            p -= 0.01 / squared * p.grad
        assert loss() < before
        assert model.eval()(x[:1]).shape == (1, 4)


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", BASELINES)
def test_width_scales_every_model_by_its_square(name):
    sizes = [parameters(create(name, 10, 3, 32, width)) for width in (16, 64, 128)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert 8 < sizes[1] / sizes[0] < 17
    assert 3 < sizes[2] / sizes[1] < 4.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "lenet"}, "model must be one of alexnet.*got 'lenet'"),
        ({"width": 12}, "width must be a multiple of 8"),
        ({"image_size": 8}, "image_size must be at least 16, got 8"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create(**{"name": "resnet18", "classes": 10, **arguments})
