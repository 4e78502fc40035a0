"""The fused separable kernel of csrc/cuda on the emulated GPU, against PyTorch in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rkl_kernels import reference
from rkl_kernels._checks import ACTIVATIONS

from .conftest import ORDERS, Gpu

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
HARDWARE_TANH = 2**-11


@dataclass(frozen=True)
class Case:
    """A separable convolution. The default sizes are odd, so that no tile of pixels or channels is full."""

    channels: int = 40
    outputs: int = 24
    kernel: int = 3
    stride: int = 1
    size: tuple[int, int] = (9, 11)
    batch: int = 2
    padding: int = 1
    dilation: int = 1
    biases: bool = True
    inner: str | None = None
    activation: str | None = None
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        numbers = (self.batch, self.channels, self.outputs, *self.size, self.kernel, self.stride, self.padding)
        names = (self.inner, self.activation, str(self.dtype).removeprefix("torch."))
        return "-".join(map(str, (*numbers, *(n for n in names if n))))

    @property
    def unit(self) -> float:
        """How far an activated value in 16 bits may be from the exact one."""
        return ROUNDING[self.dtype] + (HARDWARE_TANH if "trelu" in (self.inner, self.activation) else 0)

    @property
    def out_size(self) -> tuple[int, int]:
        span = self.dilation * (self.kernel - 1) + 1
        h, w = ((n + 2 * self.padding - span) // self.stride + 1 for n in self.size)
        return h, w


def number(name: str | None) -> int:
    return ACTIVATIONS.index(name) + 1 if name else 0


class Run:
    """A case's tensors on the device, and the results that the kernels make of them."""

    def __init__(self, gpu: Gpu, case: Case) -> None:
        torch.manual_seed(0)
        self.gpu, self.case = gpu, case
        n, c, o, k = case.batch, case.channels, case.outputs, case.kernel

        def put(*shape: int, scale: float = 1.0) -> Tensor:
            x = (torch.randn(shape) * scale).to(case.dtype)
            return gpu.put(x.to(memory_format=torch.channels_last) if len(shape) == 4 and shape[1] > 1 else x)

        self.x, self.grad = put(n, c, *case.size), put(n, o, *case.out_size)
        self.depthwise, self.pointwise = (
            put(c, 1, k, k, scale=1 / k),
            gpu.put((torch.randn(o, c) / c**0.5).to(case.dtype)),
        )
        self.depthwise_bias, self.pointwise_bias = (put(c), put(o)) if case.biases else (None, None)
        (in_h, in_w), (out_h, out_w) = case.size, case.out_size
        self.geometry = gpu.kernels.Conv2d(
            batch=n, channels=c, in_h=in_h, in_w=in_w, out_h=out_h, out_w=out_w, kernel_h=k, kernel_w=k,
            stride_h=case.stride, stride_w=case.stride, padding_h=case.padding, padding_w=case.padding,
            dilation_h=case.dilation, dilation_w=case.dilation, nhwc=True,
        )  # fmt: skip

    def plan(self) -> Any:
        case, kernels = self.case, self.gpu.kernels
        activations = number(case.inner), number(case.activation)
        dtype = self.gpu.dtype(case.dtype)
        return kernels.plan_separable(self.geometry, case.outputs, *activations, dtype, True, kernels.current_device())

    def forward(self) -> Tensor:
        case = self.case
        y = self.gpu.empty(case.batch, case.outputs, *case.out_size, dtype=case.dtype, nhwc=True)
        tensors = (self.x, self.depthwise, self.pointwise, self.depthwise_bias, self.pointwise_bias)
        self.gpu.kernels.fused_separable(
            self.plan(), self.geometry, case.outputs, *(0 if t is None else t.data_ptr() for t in tensors),
            number(case.inner), number(case.activation), y.data_ptr(), self.gpu.dtype(case.dtype), 0,
        )  # fmt: skip
        return y

    def _depthwise_out(self) -> Tensor:
        """The depthwise output in fp64, with its activation."""
        case = self.case
        bias = None if self.depthwise_bias is None else self.depthwise_bias.double()
        x, weight = self.x.double(), self.depthwise.double()
        depthwise_out = F.conv2d(x, weight, bias, case.stride, case.padding, groups=case.channels)
        return reference.activate(depthwise_out, case.inner)

    def expected(self) -> tuple[Tensor, Tensor]:
        """The output in fp64, and how far from it a result may be. The depthwise output and the output are each rounded
        once."""
        case, depthwise_out = self.case, self._depthwise_out()
        pointwise = self.pointwise.double()[:, :, None, None]
        bias = None if self.pointwise_bias is None else self.pointwise_bias.double()
        y = reference.activate(F.conv2d(depthwise_out, pointwise, bias), case.activation)
        return y, 1.2 * case.unit * (F.conv2d(depthwise_out.abs(), pointwise.abs()) + y.abs()) + 1e-6


def assert_within(actual: Tensor, expected: Tensor, allowed: Tensor) -> None:
    assert not actual.isnan().any()
    error = (actual.double() - expected).abs()
    assert (error <= allowed).all(), f"{error.max():.3g}, {(error / allowed).max():.3g} of what is allowed"


FORWARD = [
    Case(),
    Case(dtype=torch.float16, inner="relu6", activation="trelu"),
    Case(channels=32, outputs=128, size=(7, 37), biases=False, inner="trelu", activation="relu"),
    Case(channels=8, outputs=8, size=(5, 6), batch=1),
    Case(channels=64, outputs=64, size=(7, 7), batch=9, inner="silu", activation="relu6"),
    Case(channels=40, outputs=72, size=(20, 11), activation="trelu"),
    Case(channels=128, outputs=128, size=(9, 19), inner="relu"),
    Case(channels=104, outputs=96, dtype=torch.float16),
    Case(channels=96, outputs=24, size=(21, 30), stride=2, activation="relu6"),
    Case(channels=32, outputs=64, size=(21, 30), stride=2, padding=0, dtype=torch.float16),
    Case(channels=64, outputs=56, size=(16, 16), kernel=5, padding=2, activation="silu"),
    Case(channels=24, outputs=32, size=(16, 19), kernel=7, padding=3, inner="trelu"),
    Case(channels=56, outputs=16, size=(9, 19), kernel=7, padding=3),
    Case(channels=16, outputs=16, size=(9, 12), padding=0),
    Case(channels=16, outputs=16, size=(6, 9), padding=4),
]


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(gpu: Gpu, case: Case) -> None:
    assert_within(Run(gpu, case).forward(), *Run(gpu, case).expected())


# Several strips, chunks of rows and images in a block; 4 and 8 warps.
SCHEDULED = [
    Case(channels=24, outputs=24, size=(19, 40), batch=1, inner="trelu", activation="trelu"),
    Case(channels=40, outputs=40, size=(8, 7), batch=7, kernel=5, padding=2),
]


@pytest.mark.sanitized
@pytest.mark.parametrize("late_copies", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", SCHEDULED, ids=str)
def test_any_schedule_gives_the_same_bits(gpu: Gpu, case: Case, order: str, late_copies: bool) -> None:
    gpu.schedule(order, late_copies=late_copies)
    run = Run(gpu, case)
    y = run.forward()
    assert_within(y, *run.expected())
    gpu.schedule()
    assert torch.equal(run.forward(), y)


@pytest.mark.parametrize(
    ("case", "served"),
    [
        (Case(), True),
        (Case(dtype=torch.float32), False),
        (Case(channels=36), False),
        (Case(outputs=20), False),
        (Case(kernel=9, padding=4), False),
        (Case(kernel=1, padding=0), False),
        (Case(stride=3), False),
        (Case(dilation=2), False),
        (Case(channels=136), False),
        (Case(outputs=512), False),
        (Case(inner="silu"), True),
        (Case(inner="gelu"), False),
    ],
    ids=str,
)
def test_what_is_served(gpu: Gpu, case: Case, served: bool) -> None:
    assert (Run(gpu, case).plan() is not None) == served


# Bytes that blocks touch over those that cannot be avoided. The excess over 1 is the columns that neighbouring strips
# share, the rows that chunks share, and the filters, which each block reads anew, from the cache.
@pytest.mark.parametrize(
    ("case", "bound"),
    [
        (Case(channels=64, outputs=64, size=(32, 32), batch=8), 1.25),
        (Case(channels=64, outputs=64, size=(32, 32), batch=8, kernel=7, padding=3), 1.5),
        (Case(channels=32, outputs=64, size=(32, 32), batch=8, stride=2), 1.2),
    ],
    ids=str,
)
def test_bytes_moved(gpu: Gpu, case: Case, bound: float) -> None:
    run = Run(gpu, case)
    y = run.forward()
    tensors = (run.x, run.depthwise, run.pointwise, run.depthwise_bias, run.pointwise_bias, y)
    ratio = gpu.moved() / sum(t.nbytes for t in tensors)
    assert 1 <= ratio <= bound, ratio
