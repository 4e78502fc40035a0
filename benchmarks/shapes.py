"""The shapes of every benchmark: depthwise layers of published models and of ResNet-KL.

Batches are chosen so that a tensor exceeds the caches where the map allows it (GPU: 64 MB and more in 16 bits), and so
that the slowest rival still ends within a few seconds on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rkl_kernels.bench.case import Case


@dataclass(frozen=True)
class Shape:
    """One depthwise layer, with the pointwise layer after it where the model has one.

    Attributes:
        id: short name, as in every table and ``--only``.
        source: the model that it is from, or what else it stands for.
        channels: C, of the image and of the depthwise filter.
        out_channels: C' after the pointwise step. None where the model has no such step there.
        size: the image's height, and its width unless ``width`` is given.
        kernel, stride, dilation, padding: of the depthwise step, the same in height and width.
        batch_cpu, batch_gpu: images a call.
        width, kernel_width: the image's and the filter's width, where they differ from the height.
    """

    id: str
    source: str
    channels: int
    out_channels: int | None
    size: int
    kernel: int
    stride: int
    dilation: int
    padding: int
    batch_cpu: int
    batch_gpu: int
    width: int | None = None
    kernel_width: int | None = None

    def case(
        self, operator: str, direction: str = "forward", dtype: str = "fp32", device: str = "cpu", **changes: Any
    ) -> Case:
        """The case to time on ``device``, "cpu" or "cuda". ``changes`` are fields of :class:`Case`, such as batch.

        ``Case.bytes`` and ``Case.least_operations`` count the unavoidable work.
        """
        fields: dict[str, Any] = {
            "batch": self.batch_cpu if device == "cpu" else self.batch_gpu,
            "channels": self.channels,
            "height": self.size,
            "width": self.width or self.size,
            "out_channels": self.out_channels or 0,
            "kernel": self.kernel,
            "kernel_width": self.kernel_width,
            "stride": self.stride,
            "dilation": self.dilation,
            "padding": self.padding,
            "name": self.id,
        }
        return Case(operator, direction=direction, dtype=dtype, **(fields | changes))


def _shape(
    id: str,
    source: str,
    channels: int,
    out_channels: int | None,
    size: int,
    kernel: int,
    batch_cpu: int,
    batch_gpu: int,
    stride: int = 1,
    dilation: int = 1,
    padding: int | None = None,
    width: int | None = None,
    kernel_width: int | None = None,
) -> Shape:
    """A shape. The default padding keeps the map's size at stride 1."""
    if padding is None:
        padding = dilation * (kernel - 1) // 2
    return Shape(
        id, source, channels, out_channels, size, kernel, stride, dilation, padding, batch_cpu, batch_gpu, width,
        kernel_width,
    )  # fmt: skip


def _resnet_kl() -> list[Shape]:
    """Each stage's merged 7 x 7, its 3 x 3 at stride 1, and its 3 x 3 at stride 2, as between stages."""
    shapes = []
    for channels, size, batch_gpu in ((64, 32, 512), (128, 16, 1024), (256, 8, 2048), (512, 4, 4096)):
        name, doubled = f"rkl-{size}", min(2 * channels, 512)
        shapes += [
            _shape(f"{name}-k7", "ResNet-KL", channels, channels, size, 7, 32, batch_gpu),
            _shape(f"{name}-k3", "ResNet-KL", channels, channels, size, 3, 32, batch_gpu),
            _shape(f"{name}-k3s2", "ResNet-KL", channels, doubled, size, 3, 32, batch_gpu, stride=2),
        ]
    return shapes


SHAPES: tuple[Shape, ...] = (
    _shape("mnv1-112", "MobileNetV1", 32, 64, 112, 3, 16, 128),
    _shape("mnv2-112s2", "MobileNetV2", 96, 24, 112, 3, 8, 64, stride=2),
    _shape("mnv2-56", "MobileNetV2", 144, 24, 56, 3, 16, 128),
    _shape("mnv2-7", "MobileNetV2", 960, 160, 7, 3, 32, 1024),
    _shape("mnv1-14", "MobileNetV1", 512, 512, 14, 3, 32, 512),
    _shape("xcep-147", "Xception", 128, 128, 147, 3, 8, 32),
    _shape("xcep-19", "Xception", 728, 728, 19, 3, 16, 256),
    _shape("mnas-14", "MNasNet", 240, 80, 14, 5, 32, 1024),
    _shape("cnx-56", "ConvNeXt-T", 96, 384, 56, 7, 16, 128),
    _shape("cnx-14", "ConvNeXt-T", 384, 1536, 14, 7, 32, 512),
    _shape("rep-32-k13", "RepLKNet", 384, None, 32, 13, 8, 128),
    _shape("rep-32-k31", "RepLKNet", 384, None, 32, 31, 2, 128),
    _shape("dlab-33-d6", "DeepLabv3+", 2048, 256, 33, 3, 8, 32, dilation=6),
    _shape("dlab-33-d12", "DeepLabv3+", 2048, 256, 33, 3, 8, 32, dilation=12),
    _shape("dlab-33-d18", "DeepLabv3+", 2048, 256, 33, 3, 8, 32, dilation=18),
    _shape("kb-82", "KernelBench", 64, None, 512, 3, 1, 16, padding=0),
    _shape("kb-83", "KernelBench", 8, None, 512, 3, 4, 64, padding=0, kernel_width=1),
    _shape("kb-84", "KernelBench", 128, None, 256, 3, 1, 64, padding=0, width=512),
    _shape("kb-85", "KernelBench", 128, None, 128, 3, 2, 32, padding=0, width=256, kernel_width=7),
    _shape("kb-86", "KernelBench", 64, 128, 512, 3, 1, 16),
    _shape("one-112", "one image", 32, None, 112, 3, 1, 1),
    *_resnet_kl(),
)


def select(only: str | None = None) -> list[Shape]:
    """The shapes whose id begins with one of the comma-separated names. None selects all.

    Raises:
        ValueError: no shape's id begins with a name.
    """
    if only is None:
        return list(SHAPES)
    names = only.split(",")
    for name in names:
        if not any(shape.id.startswith(name) for shape in SHAPES):
            raise ValueError(f"--only must name shapes, got {name!r}; there are {', '.join(s.id for s in SHAPES)}")
    return [shape for shape in SHAPES if shape.id.startswith(tuple(names))]
