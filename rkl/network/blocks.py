"""The parts of ResNet and ResNet-KL: convolution units, the Mul block, the gate, the ST layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import rkl_kernels as rk

GateKind = Literal["none", "light", "legacy"]
ScaleMode = Literal["sum", "mixed", "stage"]
ActivationName = Literal["trelu", "relu"]


@dataclass(frozen=True)
class BlockOptions:
    """What distinguishes a ResNet-KL block from a ResNet block. Each option can be turned on alone.

    Attributes:
        separable: depthwise and pointwise convolutions instead of the blocks' dense 3x3 convolutions.
        dense_stages: the number of stages, from the first on, that keep dense 3x3 convolutions even if ``separable``.
        scales: kernel sizes of the depthwise step; more than one needs ``separable``.
        scale_mode: "sum" (all sizes added up in every channel), "mixed" (one size for each channel), or "stage" (one
            size for each stage).
        gate: "light" adds g(F) * F to the residual branch F; "legacy" is the heavy form with a ReLU before the sigmoid.
        activation: "trelu" or "relu".
    """

    separable: bool = True
    dense_stages: int = 0
    scales: tuple[int, ...] = (3, 5, 7)
    scale_mode: ScaleMode = "sum"
    gate: GateKind = "light"
    activation: ActivationName = "trelu"

    def __post_init__(self) -> None:
        for name, choice in (("scale_mode", ScaleMode), ("gate", GateKind), ("activation", ActivationName)):
            if getattr(self, name) not in get_args(choice):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choice))}, got {getattr(self, name)!r}")
        if not 0 <= self.dense_stages <= 4:
            raise ValueError(f"dense_stages must be between 0 and 4, got {self.dense_stages}")
        if not self.scales or any(k < 1 or k % 2 == 0 or k > 127 for k in self.scales):
            raise ValueError(f"scales must be odd kernel sizes of at most 127, at least one, got {self.scales}")
        if self.scale_mode == "stage" and len(self.scales) > 4:
            raise ValueError(f"scales must be at most 4 with scale_mode stage, one for each stage, got {self.scales}")
        if not self.separable and self.scales != (3,):
            raise ValueError(f"scales other than 3 need separable convolutions, got {self.scales} with separable=False")

    def at_stage(self, stage: int) -> tuple[int, ...]:
        """The kernel sizes of one stage's blocks."""
        return (self.scales[stage % len(self.scales)],) if self.scale_mode == "stage" else self.scales


def activation_layer(name: ActivationName) -> nn.Module:
    """The activation, in place: backward needs batch norm's input and T-ReLU's output, not the tensor between them."""
    return rk.TReLU(inplace=True) if name == "trelu" else nn.ReLU(inplace=True)


class MultiScaleDepthwise(nn.Module):
    """Depthwise filters of several sizes that run as one convolution. Convolution is linear, so the sum of the branches
    equals one convolution with the sum of the filters, each zero-padded to the largest.

    With ``mixed`` every channel has one of the sizes: a mask sets the taps outside of that size to zero.
    """

    mask: Tensor | None

    def __init__(self, channels: int, scales: tuple[int, ...], stride: int, mixed: bool = False) -> None:
        super().__init__()
        self.scales, self.stride, self.mixed = tuple(sorted(scales)), stride, mixed
        self.kernel_size = self.scales[-1]
        sizes = (self.kernel_size,) if mixed else self.scales
        self.filters = nn.ParameterList(torch.empty(channels, 1, k, k) for k in sizes)
        # Channel c has size scales[c % len]. The sizes are interleaved, so that pruning cuts all of them alike.
        taps = torch.tensor(self.scales)[torch.arange(channels) % len(scales)] if mixed else torch.empty(0)
        self.register_buffer("mask", self._mask(taps) if mixed else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set initial values. Their variance is that of torch's own, a third of the inverse of the number of taps,
        divided by the number of filters, since these add up."""
        for weight in self.filters:
            every = weight.new_tensor(len(self.filters) * weight[0].numel())
            taken = every if self.mask is None else self.mask.sum((2, 3), keepdim=True)
            nn.init.normal_(weight).data.mul_((3 * taken).rsqrt())

    def _mask(self, taps: Tensor) -> Tensor:
        distance = (torch.arange(self.kernel_size) - self.kernel_size // 2).abs()
        inside = distance <= taps[:, None] // 2
        return (inside[:, None, :, None] & inside[:, None, None, :]).float()

    @property
    def weight(self) -> Tensor:
        """The one filter (C, 1, K, K) that the branches add up to."""
        if self.mask is not None:
            return self.filters[0] * self.mask
        merged = self.filters[-1]
        for weight in list(self.filters)[:-1]:
            merged = merged + F.pad(weight, ((self.kernel_size - weight.shape[-1]) // 2,) * 4)
        return merged

    def forward(self, x: Tensor) -> Tensor:
        return rk.depthwise_conv2d(x, self.weight, None, self.stride, self.kernel_size // 2)

    def extra_repr(self) -> str:
        return f"scales={self.scales}, stride={self.stride}{', mixed' if self.mixed else ''}"


class MultiScaleSeparable(nn.Module):
    """Multi-scale depthwise, then pointwise convolution, in one call (equation 5)."""

    def __init__(self, c_in: int, c_out: int, scales: tuple[int, ...], stride: int = 1, mixed: bool = False) -> None:
        super().__init__()
        self.depthwise = MultiScaleDepthwise(c_in, scales, stride, mixed)
        self.pointwise = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        depthwise = self.depthwise
        return rk.separable_conv2d(
            x, depthwise.weight, self.pointwise.weight, stride=depthwise.stride, padding=depthwise.kernel_size // 2
        )


SEPARABLE = (rk.SeparableConv2d, MultiScaleSeparable)
Convolution = nn.Conv2d | rk.SeparableConv2d | MultiScaleSeparable


def spatial_conv(c_in: int, c_out: int, stride: int, options: BlockOptions, stage: int) -> Convolution:
    """A block's spatial convolution: dense 3x3, separable, or multi-scale separable."""
    if not options.separable or stage < options.dense_stages:
        return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
    scales = options.at_stage(stage)
    if len(scales) == 1:
        return rk.SeparableConv2d(c_in, c_out, scales[0], stride, padding=scales[0] // 2, bias=False)
    return MultiScaleSeparable(c_in, c_out, scales, stride, mixed=options.scale_mode == "mixed")


class Skip(nn.Conv2d):
    """A pointwise convolution at a stride, for shortcuts.

    On a CPU a pooling picks the pixels first. oneDNN's gradient of a pointwise filter at a stride writes past its
    workspace where channels_last images have fewer channels than a vector. torch 2.13 crashes at 8 channels of 64 px,
    which cuts may leave.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.stride == (1, 1):
            return super().forward(x)
        return F.conv2d(F.avg_pool2d(x, 1, self.stride), self.weight, self.bias)


class ConvUnit(nn.Module):
    """Convolution, batch norm and, unless it is None, an activation. :meth:`deployed` turns them into one call."""

    def __init__(self, conv: Convolution, activation: ActivationName | None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d((conv.pointwise if isinstance(conv, SEPARABLE) else conv).out_channels)
        self.activation_name = activation
        self.activation = activation_layer(activation) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))

    @torch.no_grad()
    def deployed(self) -> nn.Module:
        """The unit for inference. Batch norm is folded into the pointwise (or dense) filter and its bias. A separable
        convolution applies the activation in its kernel."""
        norm, last = self.norm, self.conv.pointwise if isinstance(self.conv, SEPARABLE) else self.conv
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            last.weight, last.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        if not isinstance(self.conv, SEPARABLE):
            folded = nn.utils.skip_init(
                nn.Conv2d,
                self.conv.in_channels,
                self.conv.out_channels,
                self.conv.kernel_size,
                self.conv.stride,
                self.conv.padding,
                device="meta",
            )
            folded.weight, folded.bias = weight, bias
            return nn.Sequential(folded, self.activation) if self.activation_name else folded
        depthwise = self.conv.depthwise
        separable = rk.SeparableConv2d(
            last.in_channels,
            last.out_channels,
            tuple(depthwise.weight.shape[2:]),
            depthwise.stride,
            padding=depthwise.weight.shape[-1] // 2,
            activation=self.activation_name,
            device="meta",
        )
        separable.depthwise.weight = nn.Parameter(depthwise.weight.clone())
        separable.pointwise.weight, separable.pointwise.bias = weight, bias
        return separable


class SepConv(nn.Sequential):
    """ST's unit: depthwise 3x3 stride 2 -> pointwise C -> C, then depthwise 3x3 -> pointwise C -> C', each with batch
    norm and activation."""

    def __init__(self, c_in: int, c_out: int, activation: ActivationName) -> None:
        super().__init__(
            ConvUnit(rk.SeparableConv2d(c_in, c_in, 3, stride=2, padding=1, bias=False), activation),
            ConvUnit(rk.SeparableConv2d(c_in, c_out, 3, padding=1, bias=False), activation),
        )


class Gate(nn.Module):
    """Attention over pixels and channels, with values in (0, 1). A separable convolution makes a few channels at half
    the map; a pointwise convolution and batch norm make all channels; then bilinear x2 and sigmoid.

    The gate starts neutral, as sigmoid(-3) = 0.05 everywhere. A random start cost 2.8 to 5.3 points in short runs. A
    gate as wide as its input was 45% of the parameters of ResNet-KL-18, so the gate is narrow.

    ``legacy`` is the form in the self-distillation code that this gate comes from: a whole :class:`SepConv`, batch
    norm, and a ReLU before the sigmoid. Its values lie in [0.5, 1), so it can never suppress. It starts at random.
    """

    START = -3.0
    reduce: nn.Module
    expand: nn.Module

    def __init__(self, channels: int, narrow: int, activation: ActivationName, legacy: bool = False) -> None:
        super().__init__()
        if legacy:
            self.reduce = SepConv(channels, channels, activation)
            self.expand = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
            return
        self.reduce = ConvUnit(rk.SeparableConv2d(channels, narrow, 3, stride=2, padding=1, bias=False), activation)
        self.expand = expand = ConvUnit(nn.Conv2d(narrow, channels, 1, bias=False), None)
        nn.init.zeros_(expand.norm.weight)
        nn.init.constant_(expand.norm.bias, self.START)

    def forward(self, x: Tensor) -> Tensor:
        small = self.expand(self.reduce(x))
        return torch.sigmoid(F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False))


def gate_layer(kind: GateKind, channels: int, block_channels: int, activation: ActivationName) -> Gate | None:
    """A gate for ``channels``, with a quarter of the block's own channels inside. In a bottleneck that is a sixteenth
    of the gated channels. With more, ResNet-KL-50 would have more parameters than ResNet-50."""
    return None if kind == "none" else Gate(channels, max(block_channels // 4, 8), activation, legacy=kind == "legacy")


class Block(nn.Module):
    """A residual block: act(shortcut(x) + F(x) + g(F(x)) * F(x)). Without a gate the last term is left out."""

    expansion = 1

    def __init__(self, c_in: int, channels: int, stride: int, options: BlockOptions, stage: int) -> None:
        super().__init__()
        c_out = channels * self.expansion
        self.branch = self.make_branch(c_in, channels, stride, options, stage)
        identity = stride == 1 and c_in == c_out
        self.shortcut = (
            nn.Identity() if identity else ConvUnit(Skip(c_in, c_out, 1, stride, bias=False), activation=None)
        )
        self.gate = gate_layer(options.gate, c_out, channels, options.activation)
        self.activation = activation_layer(options.activation)

    def make_branch(self, c_in: int, channels: int, stride: int, options: BlockOptions, stage: int) -> nn.Sequential:
        return nn.Sequential(
            ConvUnit(spatial_conv(c_in, channels, stride, options, stage), options.activation),
            ConvUnit(spatial_conv(channels, channels, 1, options, stage), None),
        )

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)
        out = self.shortcut(x) + branch
        if self.gate is not None:
            out = out + self.gate(branch) * branch
        return self.activation(out)


class Bottleneck(Block):
    """The deeper networks' block: 1x1, spatial, 1x1 with four times the channels."""

    expansion = 4

    def make_branch(self, c_in: int, channels: int, stride: int, options: BlockOptions, stage: int) -> nn.Sequential:
        return nn.Sequential(
            ConvUnit(nn.Conv2d(c_in, channels, 1, bias=False), options.activation),
            ConvUnit(spatial_conv(channels, channels, stride, options, stage), options.activation),
            ConvUnit(nn.Conv2d(channels, 4 * channels, 1, bias=False), None),
        )


class ExitHead(nn.Module):
    """Gate, ST layer, pool and FC: logits from a shallow stage, and its features in the deepest stage's shape.

    The ST layer has one :class:`SepConv` for each later stage. Each halves the map and doubles the channels.
    """

    def __init__(
        self, c_in: int, stages_to_come: int, classes: int, gate: GateKind, activation: ActivationName
    ) -> None:
        super().__init__()
        self.gate = gate_layer(gate, c_in, c_in, activation)
        self.st = nn.Sequential(*(SepConv(c_in * 2**i, c_in * 2 ** (i + 1), activation) for i in range(stages_to_come)))
        self.fc = nn.Linear(c_in * 2**stages_to_come, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, classes) logits and the (N, C, h, w) map before pooling."""
        features = self.st(x if self.gate is None else self.gate(x) * x)
        return self.fc(features.mean((2, 3))), features
