"""The fused separable kernels of csrc/cuda on the emulated GPU, against PyTorch in fp64."""

from __future__ import annotations

from dataclasses import dataclass

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
    """A separable convolution; odd sizes by default, so that no tile of pixels or channels is full."""

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
    """A case's tensors on the device, and what the kernels make of them."""

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

    def serves(self) -> bool:
        return self.gpu.kernels.fused_separable_serves(
            self.geometry, self.case.outputs, self.gpu.dtype(self.case.dtype)
        )

    def serves_backward(self) -> bool:
        case = self.case
        return self.gpu.kernels.fused_separable_backward_serves(
            self.geometry, case.outputs, number(case.inner), number(case.activation), self.gpu.dtype(case.dtype)
        )

    def forward(self) -> Tensor:
        case = self.case
        y = self.gpu.empty(case.batch, case.outputs, *case.out_size, dtype=case.dtype, nhwc=True)
        tensors = (self.x, self.depthwise, self.pointwise, self.depthwise_bias, self.pointwise_bias)
        self.gpu.kernels.fused_separable(
            self.geometry, case.outputs, *(0 if t is None else t.data_ptr() for t in tensors),
            number(case.inner), number(case.activation), y.data_ptr(), self.gpu.dtype(case.dtype), 0,
        )  # fmt: skip
        return y

    def backward(self, y: Tensor | None, wanted: tuple[bool, bool, bool] = (True, True, True)) -> list[Tensor | None]:
        """The gradients of the depthwise output, of the pointwise filters and of their bias."""
        case, kernels = self.case, self.gpu.kernels
        o, c = self.pointwise.shape
        sizes: list[tuple[int, ...]] = [(case.batch, c, *case.out_size), (o, c), (o,)]
        made = [
            self.gpu.empty(*size, dtype=case.dtype, nhwc=len(size) == 4) if want else None
            for size, want in zip(sizes, wanted, strict=True)
        ]
        workspace = self.gpu.empty(kernels.fused_separable_backward_workspace(self.geometry, o))
        tensors = (self.grad, y, self.x, self.depthwise, self.pointwise, self.depthwise_bias)
        kernels.fused_separable_backward(
            self.geometry, o, *(0 if t is None else t.data_ptr() for t in tensors),
            number(case.inner), number(case.activation), *(0 if t is None else t.data_ptr() for t in made),
            workspace.data_ptr(), self.gpu.dtype(case.dtype), 0,
        )  # fmt: skip
        return made

    def _middle(self) -> Tensor:
        """The depthwise output in fp64, activated."""
        case = self.case
        bias = None if self.depthwise_bias is None else self.depthwise_bias.double()
        x, weight = self.x.double(), self.depthwise.double()
        middle = F.conv2d(x, weight, bias, case.stride, case.padding, groups=case.channels)
        return reference.activate(middle, case.inner)

    def expected(self) -> tuple[Tensor, Tensor]:
        """The output in fp64, and how far from it one rounding of the middle and one of the output may lead."""
        case, middle = self.case, self._middle()
        pointwise = self.pointwise.double()[:, :, None, None]
        bias = None if self.pointwise_bias is None else self.pointwise_bias.double()
        y = reference.activate(F.conv2d(middle, pointwise, bias), case.activation)
        return y, 1.2 * case.unit * (F.conv2d(middle.abs(), pointwise.abs()) + y.abs()) + 1e-6

    def expected_gradients(self, y: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """The gradients in fp64, and how far from them roundings of dz, of the middle and of themselves may lead."""
        case, middle, pointwise = self.case, self._middle(), self.pointwise.double()
        dz = self.grad.double() * (1 if y is None else slope(y.double(), case.activation))
        before = torch.einsum("nohw,oc->nchw", dz, pointwise) * slope(middle, case.inner)
        gradients = [before, torch.einsum("nohw,nchw->oc", dz, middle), dz.sum((0, 2, 3))]
        dz, middle, pointwise = dz.abs(), middle.abs(), pointwise.abs()
        # The inner slope 1 - D^2 doubles the middle's rounding.
        sizes = [torch.einsum("nohw,oc->nchw", dz, pointwise) * 3, torch.einsum("nohw,nchw->oc", dz, middle) * 2]
        allowed = [case.unit * (s + g.abs()) for s, g in zip([*sizes, dz.sum((0, 2, 3))], gradients, strict=True)]
        return [(g, 1.05 * a + 1e-6) for g, a in zip(gradients, allowed, strict=True)]


def slope(y: Tensor, activation: str | None) -> Tensor:
    """An activation's slope, told from its output."""
    slopes = {
        None: torch.ones_like(y),
        "relu": (y > 0).double(),
        "relu6": ((y > 0) & (y < 6)).double(),
        "trelu": torch.where(y > 0, 1, 1 - y * y),
    }
    return slopes[activation]


def assert_within(actual: Tensor, expected: Tensor, allowed: Tensor) -> None:
    assert not actual.isnan().any()
    error = (actual.double() - expected).abs()
    assert (error <= allowed).all(), f"{error.max():.3g}, {(error / allowed).max():.3g} of what is allowed"


FORWARD = [
    Case(),
    Case(dtype=torch.float16, inner="relu6", activation="trelu"),
    Case(channels=72, outputs=136, size=(7, 19), biases=False, inner="trelu", activation="relu"),
    Case(channels=8, outputs=8, size=(3, 2), batch=1),
    Case(channels=64, outputs=264, size=(8, 8), batch=1, inner="silu", activation="gelu"),
    Case(channels=40, outputs=40, size=(4, 4), batch=5, activation="trelu"),
    Case(channels=32, outputs=16, size=(11, 9), stride=2, activation="relu6"),
    Case(channels=40, outputs=144, size=(10, 21), kernel=5, padding=2, inner="gelu", activation="silu"),
    Case(channels=24, outputs=80, size=(13, 13), kernel=5, stride=2, padding=2, dtype=torch.float16),
    Case(channels=40, outputs=32, size=(9, 9), kernel=7, padding=3, inner="trelu"),
    Case(channels=16, outputs=24, size=(12, 10), kernel=7, stride=2, padding=3, activation="trelu"),
    Case(channels=16, outputs=16, size=(9, 9), padding=0),
    Case(channels=16, outputs=16, size=(2, 3), padding=4),
]


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(gpu: Gpu, case: Case) -> None:
    run = Run(gpu, case)
    assert run.serves()
    assert_within(run.forward(), *run.expected())


# Inner activations are told from their output: silu and gelu have no fused backward.
BACKWARD = [
    Case(),
    Case(dtype=torch.float16, inner="relu", activation="trelu"),
    Case(channels=72, outputs=136, size=(7, 19), biases=False, inner="trelu", activation="relu"),
    Case(channels=8, outputs=8, size=(3, 2), batch=1),
    Case(channels=136, outputs=256, size=(8, 8), batch=1, inner="trelu"),
    Case(channels=40, outputs=40, size=(4, 4), batch=5, activation="trelu"),
    Case(channels=32, outputs=16, size=(23, 25), stride=2, activation="relu6"),
    Case(channels=40, outputs=144, size=(10, 21), kernel=5, padding=2, inner="relu"),
    Case(channels=24, outputs=80, size=(13, 13), kernel=5, stride=2, padding=2, dtype=torch.float16),
    Case(channels=40, outputs=32, size=(19, 17), kernel=7, padding=3, inner="trelu"),
    Case(channels=16, outputs=24, size=(12, 10), kernel=7, stride=2, padding=3, activation="trelu"),
    Case(channels=16, outputs=16, size=(2, 3), padding=4),
]


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward(gpu: Gpu, case: Case) -> None:
    run = Run(gpu, case)
    assert run.serves_backward()
    y = run.forward() if case.activation else None
    for actual, expected in zip(run.backward(y), run.expected_gradients(y), strict=True):
        assert_within(actual, *expected)


# Several tiles, chunks and slices; the second has images side by side and two tiles of output channels.
SCHEDULED = [
    Case(channels=72, outputs=24, size=(9, 18), batch=1, inner="trelu", activation="trelu"),
    Case(channels=40, outputs=264, size=(4, 3), batch=5, kernel=5, padding=2),
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
    if not run.serves_backward():
        return
    gpu.schedule(order, late_copies=late_copies)
    scheduled = run.backward(y)
    gpu.schedule()
    for actual, again, expected in zip(scheduled, run.backward(y), run.expected_gradients(y), strict=True):
        assert_within(actual, *expected)
        assert torch.equal(actual, again)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_backward_of_what_is_wanted(gpu: Gpu, wanted: tuple[bool, bool, bool]) -> None:
    run = Run(gpu, SCHEDULED[0])
    y = run.forward()
    all_gradients = run.backward(y)
    for some, whole, want in zip(run.backward(y, wanted), all_gradients, wanted, strict=True):
        assert torch.equal(some, whole) if want else some is None


@pytest.mark.parametrize(
    ("case", "served", "served_backward"),
    [
        (Case(), True, True),
        (Case(dtype=torch.float32), False, False),
        (Case(channels=36), False, False),
        (Case(outputs=20), False, False),
        (Case(kernel=9, padding=4), False, False),
        (Case(kernel=1, padding=0), False, False),
        (Case(stride=3), False, False),
        (Case(dilation=2), False, False),
        (Case(outputs=512), True, False),
        (Case(inner="silu"), True, False),
        # A tile of 7 x 7 at stride 2 and of all gradients at once is more than sm_80's shared memory.
        (Case(channels=64, outputs=256, kernel=7, stride=2, activation="relu", size=(30, 30), padding=3), True, False),
    ],
    ids=str,
)
def test_what_is_served(gpu: Gpu, case: Case, served: bool, served_backward: bool) -> None:
    run = Run(gpu, case)
    assert (run.serves(), run.serves_backward()) == (served, served_backward)


def moved(gpu: Gpu, kernel: str) -> int:
    traffic = gpu.traffic()[kernel]
    return traffic.read + traffic.written


# Bytes that blocks touch, over those that cannot be avoided: the halo is what a tile reads beside its own pixels, and
# blocks that share weights or output channels read the same bytes again, from the cache.
@pytest.mark.parametrize(
    ("case", "bound"),
    [
        (Case(channels=64, outputs=64, size=(32, 32), batch=1), 1.4),
        (Case(channels=64, outputs=64, size=(32, 32), batch=1, kernel=7, padding=3), 2.5),
        (Case(channels=32, outputs=64, size=(32, 32), batch=1, stride=2), 1.2),
        (Case(channels=64, outputs=320, size=(16, 16), batch=1), 1.8),
    ],
    ids=str,
)
def test_forward_traffic(gpu: Gpu, case: Case, bound: float) -> None:
    run = Run(gpu, case)
    y = run.forward()
    tensors = (run.x, run.depthwise, run.pointwise, run.depthwise_bias, run.pointwise_bias, y)
    ratio = moved(gpu, "separable_forward") / sum(t.nbytes for t in tensors)
    assert 1 <= ratio <= bound, ratio


@pytest.mark.parametrize(
    ("case", "bound"),
    [
        (Case(channels=64, outputs=64, size=(32, 32), batch=1, inner="trelu", activation="trelu"), 1.15),
        (Case(channels=128, outputs=64, size=(32, 32), batch=1, activation="trelu"), 1.45),
        (Case(channels=64, outputs=64, size=(32, 32), batch=1, stride=2), 1.2),
    ],
    ids=str,
)
def test_backward_traffic(gpu: Gpu, case: Case, bound: float) -> None:
    run = Run(gpu, case)
    y = run.forward() if case.activation else None
    made = run.backward(y)
    tensors = (run.x, run.depthwise, run.pointwise, run.depthwise_bias, run.grad, y, *made)
    # The workspace of the slices' sums is the price of a fixed order: a few of the filters' size a processor, whatever
    # the batch.
    workspace = 2 * 4 * gpu.kernels.fused_separable_backward_workspace(run.geometry, case.outputs)
    total = moved(gpu, "separable_backward") + moved(gpu, "add_slices") - workspace
    ratio = total / sum(t.nbytes for t in tensors if t is not None)
    assert 1 <= ratio <= bound, ratio
