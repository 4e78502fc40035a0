"""RepLKNet (Ding et al., CVPR 2022): residual blocks around one depthwise convolution of up to 31 x 31."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import rkl_kernels as rk

LARGE_KERNELS = (31, 29, 27, 13)
SMALL_KERNEL = 5


def conv_bn(c_in: int, c_out: int) -> nn.Sequential:
    """Pointwise convolution and its batch norm."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))


def depthwise_bn(channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Depthwise convolution that keeps the map's size (or divides it by the stride), and its batch norm."""
    layer = rk.DepthwiseConv2d(channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(channels))


class LargeKernelBlock(nn.Module):
    """x + pointwise(relu(large(h) + small(h))) with h = relu(pointwise(norm(x)))."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.reduce = conv_bn(channels, channels)
        self.large = depthwise_bn(channels, kernel)
        self.small = depthwise_bn(channels, min(SMALL_KERNEL, kernel))
        self.expand = conv_bn(channels, channels)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.reduce(self.norm(x)))
        return x + self.expand(self.activation(self.large(h) + self.small(h)))


class FeedForward(nn.Module):
    """x plus two pointwise layers, with four times the channels between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels),
            *conv_bn(channels, 4 * channels),
            nn.GELU(),
            *conv_bn(4 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class RepLKNet(nn.Module):
    """The network. ``channels`` (128, 256, 512, 1024) and ``blocks`` (2, 2, 18, 2) make the published RepLKNet-31B.

    Args:
        classes: number of classes.
        channels, blocks: one value for each stage.
        stem_strides: strides of the two downsampling steps before the first stage.
        image_size: limits a stage's kernel to the size that reaches across its whole map (2 * map - 1).
    """

    def __init__(
        self,
        classes: int,
        channels: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 6, 2),
        stem_strides: tuple[int, int] = (2, 2),
        image_size: int = 224,
    ) -> None:
        super().__init__()
        first, relu = channels[0], nn.ReLU(inplace=True)
        layers: list[nn.Module] = [
            nn.Conv2d(3, first, 3, stem_strides[0], 1, bias=False),
            nn.BatchNorm2d(first),
            relu,
            *depthwise_bn(first, 3),
            relu,
            *conv_bn(first, first),
            relu,
            *depthwise_bn(first, 3, stem_strides[1]),
            relu,
        ]
        size = -(-image_size // (stem_strides[0] * stem_strides[1]))
        for stage, (width, count) in enumerate(zip(channels, blocks, strict=True)):
            if stage:
                layers += [*conv_bn(channels[stage - 1], width), relu, *depthwise_bn(width, 3, 2), relu]
                size = -(-size // 2)
            kernel = min(LARGE_KERNELS[stage], 2 * size - 1)
            for _ in range(count):
                layers += [LargeKernelBlock(width, kernel), FeedForward(width)]
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels[-1]))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
