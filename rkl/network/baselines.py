"""The networks that the paper compares with, in one registry. One rule fits them to small images.

The rule is the same for all, and for ResNet-KL's own stem:

- up to 64 px the first convolution becomes 3 x 3 with stride 1 and the pooling of the stem goes;
- up to 128 px it becomes 3 x 3 with stride 2 and the pooling of the stem goes;
- larger images get the standard model unchanged.

Up to 128 px, poolings without padding round sizes up, so that no map vanishes, and a head pools to at most the size of
the last map. ``width`` scales every layer alike; 64 is the standard model. All networks use the same initialisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .replknet import RepLKNet

STANDARD_WIDTH = 64


@dataclass(frozen=True)
class Baseline:
    """How to build a standard model, and where the parts are that the rule changes.

    Attributes:
        build: a function of the number of classes that returns the standard model.
        stem, pool: paths of the first convolution and of the stem's pooling.
        head: paths of a pooling to a fixed size and of the Linear after the pooling.
        unit: channels that are scaled together, where the model concatenates or splits halves of a map's channels.
    """

    build: Callable[[int], nn.Module]
    stem: str
    pool: str | None = None
    head: tuple[str, str] | None = None
    unit: int = 8


def _torchvision(name: str, **options: object) -> Callable[[int], nn.Module]:
    def build(classes: int) -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=classes, **options)

    return build


def _timm(name: str) -> Callable[[int], nn.Module]:
    def build(classes: int) -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=classes)

    return build


BASELINES = {
    "alexnet": Baseline(_torchvision("alexnet"), "features.0", "features.2", ("avgpool", "classifier.1")),
    "vgg": Baseline(_torchvision("vgg16_bn"), "features.0", None, ("avgpool", "classifier.0")),
    "resnet18": Baseline(_torchvision("resnet18"), "conv1", "maxpool"),
    "resnet50": Baseline(_torchvision("resnet50"), "conv1", "maxpool"),
    "densenet": Baseline(_torchvision("densenet121"), "features.conv0", "features.pool0"),
    "googlenet": Baseline(_torchvision("googlenet", aux_logits=False, init_weights=False), "conv1.conv", "maxpool1"),
    "mobilenet": Baseline(_timm("mobilenetv1_100"), "conv_stem"),
    "shufflenet": Baseline(_torchvision("shufflenet_v2_x1_0"), "conv1.0", "maxpool", unit=58),
    "xception": Baseline(_timm("legacy_xception"), "conv1"),
    "replknet": Baseline(lambda classes: RepLKNet(classes), "features.0"),
}
"""The paper's ten. RepLKNet is a small form of this project's own: the paper does not say which it trained."""

NAMES = tuple(BASELINES)
"""The names that :func:`create` accepts."""


def create(
    name: str, classes: int, in_channels: int = 3, image_size: int = 224, width: int = STANDARD_WIDTH
) -> nn.Module:
    """A baseline by name. ``model(x)`` maps images (N, in_channels, image_size, image_size) to logits (N, classes).

    Raises:
        ValueError: an unknown name, or a width that is no multiple of 8 between 8 and 256.
    """
    if name not in BASELINES:
        raise ValueError(f"model must be one of {', '.join(BASELINES)}, got {name!r}")
    if width % 8 or not 8 <= width <= 256:
        raise ValueError(f"width must be a multiple of 8 between 8 and 256, got {width}")
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16, got {image_size}")
    baseline = BASELINES[name]
    with torch.device("meta"):  # no memory is taken before the shapes are final
        model = _replknet(classes, image_size) if name == "replknet" else baseline.build(classes)
        stem = _stem(model, baseline)
        stem.in_channels = in_channels
        if image_size <= 128:
            _adapt_stem(model, baseline, image_size)
        _scale_width(model, stem, width, baseline.unit)
        if image_size <= 128 and baseline.head:
            _adapt_head(model, *baseline.head, (2, in_channels, image_size, image_size))
    model.to_empty(device="cpu")
    model.apply(_initialise)
    return model


def _replknet(classes: int, image_size: int) -> RepLKNet:
    strides = (1, 1) if image_size <= 64 else (2, 1) if image_size <= 128 else (2, 2)
    return RepLKNet(classes, stem_strides=strides, image_size=image_size)


def _stem(model: nn.Module, baseline: Baseline) -> nn.Conv2d:
    stem = model.get_submodule(baseline.stem)
    assert isinstance(stem, nn.Conv2d)
    return stem


def _adapt_stem(model: nn.Module, baseline: Baseline, image_size: int) -> None:
    stem = _stem(model, baseline)
    stem.kernel_size, stem.padding = (3, 3), (1, 1)
    stem.stride = (1, 1) if image_size <= 64 else (2, 2)
    if baseline.pool:
        model.set_submodule(baseline.pool, nn.Identity())
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d) and module.padding == 0:
            module.ceil_mode = True


def _adapt_head(model: nn.Module, pool: str, linear: str, shape: tuple[int, ...]) -> None:
    """If the last map is smaller than the standard pooling, pool to its size, and narrow the Linear that follows."""
    last = model.get_submodule("features")(torch.empty(shape)).shape[-1]
    pooling, layer = model.get_submodule(pool), model.get_submodule(linear)
    assert isinstance(pooling, nn.AdaptiveAvgPool2d)
    assert isinstance(layer, nn.Linear)
    assert isinstance(pooling.output_size, tuple)
    standard = pooling.output_size[0]
    assert standard is not None
    if last < standard:
        pooling.output_size = (last, last)
        layer.in_features = layer.in_features // standard**2 * last**2
        _resize_parameters(layer)


def _scale_width(model: nn.Module, stem: nn.Module, width: int, unit: int) -> None:
    """Scale every layer's channels by width / 64. The image's channels and the classes stay."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    last = [m for m in layers if isinstance(m, nn.Linear)][-1]

    def scaled(channels: int) -> int:
        whole = unit if channels % unit == 0 else 8
        return channels // whole * round(whole * width / STANDARD_WIDTH)

    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.num_features = scaled(layer.num_features)
        elif isinstance(layer, nn.Linear):
            layer.in_features = scaled(layer.in_features)
            layer.out_features = layer.out_features if layer is last else scaled(layer.out_features)
        else:
            layer.groups = scaled(layer.groups) if layer.groups > 1 else 1
            layer.in_channels = layer.in_channels if layer is stem else scaled(layer.in_channels)
            layer.out_channels = scaled(layer.out_channels)
        _resize_parameters(layer)


def _resize_parameters(layer: nn.Conv2d | nn.BatchNorm2d | nn.Linear) -> None:
    """Give a layer new, uninitialised parameters of the sizes in its attributes."""
    if isinstance(layer, nn.BatchNorm2d):
        for name in ("weight", "bias"):
            setattr(layer, name, nn.Parameter(torch.empty(layer.num_features)))
        for name in ("running_mean", "running_var"):
            layer.register_buffer(name, torch.empty(layer.num_features))
        return
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (layer.out_features, layer.in_features)
    else:
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    layer.weight = nn.Parameter(torch.empty(shape))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(shape[0]))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.Linear):
        module.reset_parameters()
