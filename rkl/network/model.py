"""ResNet-KL, and the plain ResNet that it is compared with. Both have one backbone; each difference is an option."""

from __future__ import annotations

import copy
import zlib
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import SEPARABLE, Block, BlockOptions, Bottleneck, ConvUnit, ExitHead, GateKind, MultiScaleDepthwise

if TYPE_CHECKING:
    from typing_extensions import Self

DEPTHS: dict[int, tuple[type[Block], tuple[int, int, int, int]]] = {
    18: (Block, (2, 2, 2, 2)),
    34: (Block, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}
"""For each depth, the kind of block and the number of blocks in each stage."""


class Exits(NamedTuple):
    """Every head's output, shallow to deep.

    Attributes:
        logits: (N, classes) each.
        features: (N, C, f, f) each, all of one shape, the deepest stage's unless ``feature_size`` is set; empty where a
            model returns logits only.

    Examples:
        >>> from rkl.network.model import ResNetKL
        >>> exits = ResNetKL(10, width=16).forward_exits(torch.randn(2, 3, 32, 32))
        >>> [tuple(logits.shape) for logits in exits.logits]
        [(2, 10), (2, 10), (2, 10), (2, 10)]
        >>> {tuple(features.shape) for features in exits.features}
        {(2, 128, 4, 4)}
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor, ...] = ()


class ResNet(nn.Module):
    """ResNet of depth 18, 34 or 50 with stems for small images. The default options make the textbook network.

    Args:
        classes: number of classes.
        depth: 18, 34 (basic blocks) or 50 (bottlenecks, four times the channels).
        width: channels of the first stage; each later stage doubles them.
        in_channels: channels of the images.
        image_size: decides the stem: up to 64 a 3x3 convolution, up to 128 one of stride 2, else 7x7 stride 2 and
            max-pool.
        options: options of the blocks.

    Raises:
        ValueError: an unknown depth, or too few classes, channels or pixels.

    Examples:
        >>> from rkl.network.model import ResNet
        >>> ResNet(10, width=16)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int,
        depth: int = 18,
        width: int = 64,
        in_channels: int = 3,
        image_size: int = 32,
        options: BlockOptions | None = None,
    ) -> None:
        super().__init__()
        start = int(torch.randint(2**62, (), device="cpu"))
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}")
        for name, value in (("classes", classes), ("width", width), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8, as three stages halve the image, got {image_size}")
        self.options = options or BlockOptions(separable=False, scales=(3,), gate="none", activation="relu")
        block, counts = DEPTHS[depth]
        self.stem = self._stem(in_channels, width, image_size)
        self.stages = nn.ModuleList()
        channels = width
        for stage, count in enumerate(counts):
            blocks = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(channels, width * 2**stage, stride, self.options, stage))
                channels = width * 2**stage * block.expansion
            self.stages.append(nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)
        self.stage_channels = [width * 2**stage * block.expansion for stage in range(4)]
        self._add_exits(classes)
        self._initialise(start)

    def _add_exits(self, classes: int) -> None:
        """Add the shallow heads, in a model that has several exits."""

    def _stem(self, in_channels: int, width: int, image_size: int) -> nn.Module:
        kernel, stride = (3, 1) if image_size <= 64 else (3, 2) if image_size <= 128 else (7, 2)
        unit = ConvUnit(nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False), self.options.activation)
        return unit if image_size <= 128 else nn.Sequential(unit, nn.MaxPool2d(3, 2, 1))

    def _initialise(self, start: int) -> None:
        """Initialise dense filters by He's normal values. The separable layers keep torch's, of the smaller variance
        1 / (3 * fan-in). A batch norm follows each filter, so a filter's scale does not change the output: it decides
        how far one step turns the filter.

        The random numbers of a layer are seeded by ``start`` and the layer's name. So models of one seed have the same
        values in all layers that they share, whatever other layers they have.
        """
        separable = [module for module in self.modules() if isinstance(module, SEPARABLE)]
        own = {part for module in separable for part in module.modules()}
        with torch.random.fork_rng(devices=[]):
            for name, module in self.named_modules():
                if isinstance(module, nn.Conv2d | nn.Linear | MultiScaleDepthwise):
                    torch.manual_seed((start ^ zlib.crc32(name.encode())) % 2**62)
                    module.reset_parameters()
                    if isinstance(module, nn.Conv2d) and module not in own:
                        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def head(self, stage: int, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and feature map of the exit after a stage. The plain network has one exit, after the last stage."""
        if stage != 3:
            raise ValueError(f"stage must be 3, the only one with an exit, got {stage}")
        return self.fc(features.mean((2, 3))), features

    @property
    def exit_stages(self) -> list[int]:
        """The stages with an exit, shallow to deep."""
        return [3]

    def forward_exits(self, x: Tensor) -> Exits:
        """Every exit's logits and features, in training and eval mode alike."""
        outputs = []
        x = self.stem(x)
        for stage, blocks in enumerate(self.stages):
            x = blocks(x)
            if stage in self.exit_stages:
                outputs.append(self.head(stage, x))
        logits, features = zip(*outputs, strict=True)
        return Exits(logits, features)

    def forward(self, x: Tensor) -> Tensor | Exits:
        x = self.stem(x)
        for blocks in self.stages:
            x = blocks(x)
        return self.fc(x.mean((2, 3)))

    def deploy(self) -> Self:
        """A copy for inference, without what only training needs. Each batch norm is folded into the filter before it;
        separable kernels add the bias and apply the activation. Parameters need no gradient.

        Equivalent to this model in eval mode, up to rounding.
        """
        deployed = copy.deepcopy(self).eval().requires_grad_(False)
        for parent in list(deployed.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, ConvUnit):
                    setattr(parent, name, child.deployed().eval().requires_grad_(False))
        return deployed


class ResNetKL(ResNet):
    """ResNet-KL: Mul blocks, and a head after every stage for self-distillation and early exit (figures 2.1, 3.1, 3.2).

    ``model(x)`` returns ``Exits`` in training mode and the deepest logits, a plain tensor, in eval mode. The other
    arguments are those of ``ResNet``; ``options`` defaults to all of ResNet-KL's parts.

    Args:
        feature_size: height and width that all feature maps are pooled to; by default the deepest stage's.
        exit_gate: the gate of the three shallow heads; ``options.gate`` is the gate of the blocks.

    Raises:
        ValueError: as in ``ResNet``, or a ``feature_size`` below 1.

    Examples:
        >>> from rkl.network.model import ResNetKL
        >>> model, images = ResNetKL(10, width=16), torch.randn(2, 3, 32, 32)
        >>> len(model(images).logits), model.eval()(images).shape
        (4, torch.Size([2, 10]))
        >>> deployed = model.deploy()  # norms folded, shallow heads gone
        >>> torch.allclose(deployed(images), model(images), rtol=1e-3, atol=1e-4)
        True
    """

    def __init__(
        self,
        classes: int,
        depth: int = 18,
        width: int = 64,
        in_channels: int = 3,
        image_size: int = 32,
        options: BlockOptions | None = None,
        feature_size: int | None = None,
        exit_gate: GateKind = "light",
    ) -> None:
        if feature_size is not None and feature_size < 1:
            raise ValueError(f"feature_size must be at least 1, got {feature_size}")
        self._exit_gate = exit_gate
        super().__init__(classes, depth, width, in_channels, image_size, options or BlockOptions())
        self.feature_size = feature_size

    def _add_exits(self, classes: int) -> None:
        self.exits = nn.ModuleList(
            ExitHead(channels, 3 - stage, classes, self._exit_gate, self.options.activation)
            for stage, channels in enumerate(self.stage_channels[:3])
        )

    @property
    def exit_stages(self) -> list[int]:
        return [*range(len(self.exits)), 3]

    def head(self, stage: int, features: Tensor) -> tuple[Tensor, Tensor]:
        if stage < 3:
            return self.exits[stage](features)
        return super().head(stage, features)

    def forward_exits(self, x: Tensor) -> Exits:
        logits, features = super().forward_exits(x)
        height, width = features[-1].shape[-2:] if self.feature_size is None else (self.feature_size,) * 2
        size = (height, width)
        pooled = (f if f.shape[-2:] == size else F.adaptive_avg_pool2d(f, size) for f in features)
        return Exits(logits, tuple(pooled))

    def forward(self, x: Tensor) -> Tensor | Exits:
        return self.forward_exits(x) if self.training else super().forward(x)

    def deploy(self, exits: bool = False) -> Self:
        """As ``ResNet.deploy``. ``exits=True`` keeps the shallow heads, for early exit."""
        deployed = super().deploy()
        if not exits:
            deployed.exits = nn.ModuleList()
        return deployed


def all_exits(model: nn.Module, x: Tensor) -> Exits:
    """Every exit of any model. A model that only returns logits has one exit.

    Examples:
        >>> from rkl.network.model import all_exits
        >>> exits = all_exits(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), torch.randn(2, 3, 2, 2))
        >>> len(exits.logits), exits.features
        (1, ())
    """
    if isinstance(model, ResNet):
        return model.forward_exits(x)
    output = model(x)
    return output if isinstance(output, Exits) else Exits((output,))
