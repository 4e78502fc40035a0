"""What is timed: one operator on one shape, in one type and one direction, and the least work that it needs.

This module only holds data and counts. It does not need torch.
"""

from __future__ import annotations

from dataclasses import dataclass

OPERATORS = ("trelu", "depthwise", "separable")
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""The types' short names, and the bytes of an element."""
DIRECTIONS = ("forward", "backward", "data", "weight")
"""backward: all gradients at once; data: only the image's gradient; weight: only the filters' gradients."""


@dataclass(frozen=True)
class Case:
    """One operator, shape, type and direction. Both memory layouts belong to the same case.

    Attributes:
        operator: "trelu", "depthwise" or "separable" (depthwise, then pointwise).
        batch, channels, height, width: of the image.
        out_channels: C' of the pointwise step; ignored for the other operators.
        kernel, stride, dilation, padding: of the depthwise step, the same in height and width.
        kernel_width: the filter's width, where it differs from the height.
        tf32: whether every contestant multiplies fp32 values in TF32 instead of fp32.
        activation: the activation after the pointwise step, as in :func:`rkl_kernels.separable_conv2d`, or None.
        name: the shape's name in tables.
    """

    operator: str
    batch: int
    channels: int
    height: int
    width: int
    out_channels: int = 0
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    dtype: str = "fp32"
    direction: str = "forward"
    activation: str | None = None
    name: str = ""
    kernel_width: int | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        for argument, value, choices in (
            ("operator", self.operator, OPERATORS),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("direction", self.direction, DIRECTIONS),
        ):
            if value not in choices:
                raise ValueError(f"{argument} must be one of {', '.join(choices)}, got {value!r}")
        least = dict.fromkeys(
            ("batch", "channels", "height", "width", "kernel", "filter_width", "stride", "dilation"), 1
        )
        for argument, bound in (least | {"padding": 0, "out_channels": self.operator == "separable"}).items():
            if getattr(self, argument) < bound:
                name = "kernel_width" if argument == "filter_width" else argument
                raise ValueError(f"{name} must be at least {int(bound)}, got {getattr(self, argument)}")
        if self.operator == "trelu" and self.direction in ("data", "weight"):
            raise ValueError(f"direction must be forward or backward for trelu, got {self.direction!r}")
        if self.tf32 and self.dtype != "fp32":
            raise ValueError(f"tf32 must be False for {self.dtype}, got True")
        if self.operator != "separable" and self.activation is not None:
            raise ValueError(f"activation must be None for {self.operator}, got {self.activation!r}")
        if self.operator != "trelu" and min(self.out_height, self.out_width) < 1:
            raise ValueError(
                f"kernel must fit into the padded image, got kernel {self.kernel} x {self.filter_width} with "
                f"dilation {self.dilation} for {self.height} x {self.width} padded by {self.padding}"
            )

    @property
    def id(self) -> str:
        """The row's name in every table."""
        return f"{self.operator} {self.direction} {self.precision} {self.name}".rstrip()

    @property
    def precision(self) -> str:
        """The type's name, or "tf32"."""
        return "tf32" if self.tf32 else self.dtype

    @property
    def filter_width(self) -> int:
        return self.kernel if self.kernel_width is None else self.kernel_width

    @property
    def out_height(self) -> int:
        return self.height if self.operator == "trelu" else self._out(self.height, self.kernel)

    @property
    def out_width(self) -> int:
        return self.width if self.operator == "trelu" else self._out(self.width, self.filter_width)

    def _out(self, size: int, kernel: int) -> int:
        return (size + 2 * self.padding - self.dilation * (kernel - 1) - 1) // self.stride + 1

    @property
    def repeats(self) -> bool:
        """Whether a layer's output can be the next one's image."""
        channels = self.out_channels if self.operator == "separable" else self.channels
        shape = (channels, self.out_height, self.out_width)
        return self.direction == "forward" and shape == (self.channels, self.height, self.width)

    @property
    def _filters(self) -> int:
        pointwise = self.channels * self.out_channels if self.operator == "separable" else 0
        return self.channels * self.kernel * self.filter_width + pointwise

    @property
    def bytes(self) -> int:
        """The least bytes to move: each input is read once, each output is written once."""
        image = self.batch * self.channels * self.height * self.width
        if self.operator == "trelu":  # backward reads the gradient and the output, and writes a gradient
            return (2 if self.direction == "forward" else 3) * image * DTYPES[self.dtype]
        channels = self.out_channels if self.operator == "separable" else self.channels
        result = self.batch * channels * self.out_height * self.out_width
        # Forward, data and weight move image, filters and result once. Backward adds the gradients of the first two.
        once = image + self._filters + result
        return (once + (image + self._filters if self.direction == "backward" else 0)) * DTYPES[self.dtype]

    @property
    def operations(self) -> int:
        """The floating-point operations. A multiply-add counts as two, also where it meets the padding's zeros, as in
        PyTorch's FLOP counter. T-ReLU counts one for each value."""
        if self.operator == "trelu":
            return self.batch * self.channels * self.height * self.width
        forward = 2 * self.batch * self.out_height * self.out_width * self._filters
        return 2 * forward if self.direction == "backward" else forward

    @property
    def least_operations(self) -> int:
        """The operations without the products with the padding's zeros, which nobody needs to make: 31 x 31 filters
        on 32 px have 1.74 times as many with them."""
        if self.operator == "trelu":
            return self.operations
        outputs = self.out_height * self.out_width
        taps = self._taps(self.height, self.kernel) * self._taps(self.width, self.filter_width)
        saved = 2 * self.batch * self.channels * (outputs * self.kernel * self.filter_width - taps)
        return self.operations - (2 * saved if self.direction == "backward" else saved)

    def _taps(self, size: int, kernel: int) -> int:
        """How many taps of a filter's row or column lie in the image, over all its outputs."""
        starts = range(-self.padding, self._out(size, kernel) * self.stride - self.padding, self.stride)
        return sum(0 <= start + tap * self.dilation < size for start in starts for tap in range(kernel))
