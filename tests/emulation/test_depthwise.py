"""The depthwise kernels of csrc/cuda on the emulated GPU, against PyTorch in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .conftest import DTYPES, ORDERS, Gpu

# One rounding to the element type, relative to the sum of magnitudes; fp32 has the sums' own error too.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass(frozen=True)
class Case:
    """A depthwise convolution; odd sizes by default, so that no tile is full."""

    channels: int = 16
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (9, 11)
    batch: int = 2
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    nhwc: bool = True

    def __str__(self) -> str:
        numbers = (self.channels, *self.kernel, *self.size, *self.stride, *self.padding, *self.dilation)
        return f"{'nhwc' if self.nhwc else 'nchw'}-{self.batch}x" + "-".join(map(str, numbers))

    @property
    def out_size(self) -> tuple[int, int]:
        zipped = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        h, w = ((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in zipped)
        return h, w


class Run:
    """A case's tensors on the device, and what the kernels make of them."""

    def __init__(self, gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.gpu, self.case, self.number = gpu, case, gpu.dtype(dtype)
        c, n = case.channels, case.batch
        self.x, self.grad = (self.random(n, c, *size, dtype=dtype) for size in (case.size, case.out_size))
        self.weight, self.bias = self.random(c, 1, *case.kernel, dtype=dtype), self.random(c, dtype=dtype)
        names = (
            "in_h",
            "in_w",
            "out_h",
            "out_w",
            "kernel_h",
            "kernel_w",
            "stride_h",
            "stride_w",
            "padding_h",
            "padding_w",
        )
        values = (*case.size, *case.out_size, *case.kernel, *case.stride, *case.padding)
        self.geometry = gpu.kernels.Conv2d(
            batch=n, channels=c, nhwc=case.nhwc, dilation_h=case.dilation[0], dilation_w=case.dilation[1],
            **dict(zip(names, values, strict=True)),
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a result; an image has the case's layout."""
        return self.gpu.empty(*shape, dtype=dtype, nhwc=len(shape) == 4 and shape[1] > 1 and self.case.nhwc)

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.empty(*shape, dtype=dtype).copy_(torch.randn(shape, dtype=dtype))

    def forward(self, with_bias: bool = True) -> Tensor:
        y = self.empty(*self.grad.shape, dtype=self.x.dtype)
        bias = self.bias.data_ptr() if with_bias else 0
        self.gpu.kernels.depthwise(
            self.geometry, self.x.data_ptr(), self.weight.data_ptr(), bias, y.data_ptr(), self.number, 0
        )
        return y

    def input_grad(self) -> Tensor:
        dx = self.empty(*self.x.shape, dtype=self.x.dtype)
        self.gpu.kernels.depthwise_input_grad(
            self.geometry, self.grad.data_ptr(), self.weight.data_ptr(), dx.data_ptr(), self.number, 0
        )
        return dx

    def weight_grad(self, weight: bool = True, bias: bool = True) -> tuple[Tensor, Tensor]:
        dw, db = (self.empty(*t.shape, dtype=self.x.dtype) for t in (self.weight, self.bias))
        workspace = self.empty(self.gpu.kernels.weight_grad_workspace(self.geometry))
        wanted = (dw.data_ptr() if weight else 0, db.data_ptr() if bias else 0)
        self.gpu.kernels.depthwise_weight_grad(
            self.geometry, self.grad.data_ptr(), self.x.data_ptr(), *wanted, workspace.data_ptr(), self.number, 0
        )
        return dw, db

    def compared(self, x: Tensor) -> Tensor:
        """The part of a tensor that is looked at."""
        return x

    def reference(self, magnitudes: bool = False) -> tuple[Tensor, ...]:
        """y, dx, dw, db in fp64; of the tensors' magnitudes for the error bounds."""
        x, w, b, grad = (self.compared(t).double().clone() for t in (self.x, self.weight, self.bias, self.grad))
        if magnitudes:
            x, w, b, grad = (t.abs() for t in (x, w, b, grad))
        for t in (x, w, b):
            t.requires_grad_()
        case = self.case
        y = F.conv2d(x, w, b, case.stride, case.padding, case.dilation, groups=len(w))
        return (y.detach(), *torch.autograd.grad(y, (x, w, b), grad))


def assert_right(run: Run, *names: str) -> None:
    results: dict[str, Tensor] = {}
    if "y" in names:
        results["y"] = run.forward()
    if "dx" in names:
        results["dx"] = run.input_grad()
    if "dw" in names:
        results["dw"], results["db"] = run.weight_grad()
    expected = dict(zip(("y", "dx", "dw", "db"), run.reference(), strict=True))
    scales = dict(zip(("y", "dx", "dw", "db"), run.reference(magnitudes=True), strict=True))
    for name, whole in results.items():
        result = run.compared(whole)
        assert not result.isnan().any(), f"{name} has elements that were not written"
        info = torch.finfo(result.dtype)
        bound = TOLERANCE[result.dtype] * scales[name] + info.tiny * info.eps  # the last: a step of a subnormal number
        excess = ((result.double() - expected[name]).abs() / bound).max()
        assert excess <= 1, f"{name}: error {excess:.3g} times its bound"


# What no fast path covers: dilation, strides apart, even kernels, channels that fill no vector, large kernels.
GENERAL = [
    Case(channels=5, kernel=(2, 4), stride=(1, 3), padding=(0, 2)),
    Case(channels=24, kernel=(3, 3), padding=(2, 2), dilation=(2, 2)),
    Case(channels=24, kernel=(3, 5), stride=(2, 1), padding=(4, 3), dilation=(3, 2), size=(12, 9)),
    Case(channels=72, kernel=(1, 3), padding=(0, 0), size=(3, 3)),
    Case(channels=3, kernel=(1, 1), padding=(0, 0), batch=3),
    Case(channels=4, kernel=(3, 2), stride=(3, 2), nhwc=False),
    Case(channels=2, kernel=(3, 5), stride=(2, 1), padding=(4, 3), dilation=(3, 2), size=(12, 9), nhwc=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GENERAL, ids=str)
def test_general(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    assert_right(Run(gpu, case, dtype), "y", "dx", "dw")


# The fast paths: odd maps, tiles not full, strips and chunks, channels that do not fill a block, wide padding, none.
NHWC = [
    Case(channels=72, kernel=(k, k), size=size, padding=(p, p), stride=(s, s), batch=n)
    for s in (1, 2)
    for k, p, n, size in (
        (3, 1, 2, (9, 19)),
        (3, 0, 1, (7, 3)),
        (3, 3, 1, (5, 4)),
        (5, 2, 1, (10, 21)),
        (5, 1, 2, (5, 6)),
        (7, 3, 1, (11, 37)),
        (7, 0, 1, (8, 7)),
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NHWC, ids=str)
def test_nhwc(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    run = Run(gpu, case, dtype)
    assert_right(run, "y", "dx", "dw")
    gradient = "depthwise_nhwc_kernel" if case.stride == (1, 1) else "stride2_grad_nhwc_kernel"
    assert set(gpu.traffic()) == {"depthwise_nhwc_kernel", gradient, "weight_grad_nhwc_kernel", "add_parts"}


# Planes of several to a block and of several blocks each, rows that begin at any address.
NCHW = [
    Case(channels=c, kernel=(k, k), size=size, padding=(p, p), stride=(s, s), batch=n, nhwc=False)
    for s in (1, 2)
    for k, p, n, c, size in (
        (3, 1, 3, 5, (7, 7)),
        (3, 0, 1, 1, (70, 171)),
        (3, 3, 2, 3, (5, 4)),
        (5, 2, 2, 3, (10, 21)),
        (7, 3, 1, 2, (11, 37)),
        (7, 0, 3, 3, (8, 7)),
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NCHW, ids=str)
def test_nchw(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    run = Run(gpu, case, dtype)
    assert_right(run, "y", "dx", "dw")
    gradient = "depthwise_nchw_kernel" if case.stride == (1, 1) else "stride2_grad_nchw_kernel"
    assert set(gpu.traffic()) == {"depthwise_nchw_kernel", gradient, "weight_grad_nchw_kernel", "add_parts"}


def test_general_with_the_largest_filter(gpu: Gpu) -> None:
    run = Run(gpu, Case(channels=8, kernel=(31, 31), padding=(15, 15), batch=1, size=(5, 9)), torch.float32)
    assert_right(run, "y", "dx")
    assert set(gpu.traffic()) == {"any_vectors"}


# The tensor cores' path: maps of several images to a tile and of several tiles each, tiles of every number of columns,
# rows that begin at any address, paddings that are a multiple of 8 or not, wide, none; filters not square, even, and
# the narrowest and widest; more channels than a block has, and fewer.
WIDE = [
    Case(channels=c, kernel=kernel, size=size, padding=padding, batch=n, nhwc=nhwc)
    for nhwc, c in ((True, 24), (False, 9))
    for kernel, padding, n, size in (
        ((13, 13), (6, 6), 5, (7, 7)),
        ((13, 13), (6, 6), 1, (35, 40)),
        ((9, 9), (0, 0), 3, (12, 27)),
        ((5, 17), (2, 8), 2, (14, 24)),
        ((31, 31), (15, 15), 3, (9, 17)),
        ((31, 31), (30, 30), 1, (3, 4)),
        ((14, 25), (7, 12), 1, (10, 66)),
        ((3, 33), (4, 24), 1, (6, 9)),
    )
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide_filters_on_tensor_cores(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    assert_right(Run(gpu, case, dtype), "y", "dx")
    assert set(gpu.traffic()) == {"depthwise_toeplitz_kernel"}


def test_what_wide_filters_leave_to_the_general_kernel(gpu: Gpu) -> None:
    wide = Case(channels=8, kernel=(13, 13), padding=(6, 6), size=(14, 15), batch=1)
    for case, dtype in (
        (wide, torch.float32),
        (replace(wide, stride=(2, 2)), torch.bfloat16),
        (replace(wide, dilation=(1, 2)), torch.bfloat16),
        (replace(wide, channels=4), torch.bfloat16),
    ):
        assert_right(Run(gpu, case, dtype), "y")
    assert "depthwise_toeplitz_kernel" not in gpu.traffic()


# One case a kernel, several strips, chunks or steps each.
EVERY_KERNEL = [
    Case(channels=8, kernel=(2, 3), size=(5, 4)),
    Case(channels=3, kernel=(2, 3), size=(5, 4)),
    Case(channels=72, size=(13, 18), batch=1),
    Case(channels=8, kernel=(5, 5), stride=(2, 2), padding=(2, 2), size=(13, 35), batch=1),
    Case(channels=8, kernel=(7, 7), padding=(3, 3), size=(9, 33), batch=1),
    Case(channels=3, size=(13, 18), nhwc=False),
    Case(channels=1, kernel=(7, 7), stride=(2, 2), padding=(3, 3), size=(150, 90), batch=1, nhwc=False),
]
EVERY_WIDE_KERNEL = [
    Case(channels=16, kernel=(9, 9), padding=(4, 4), size=(5, 11), batch=9),
    Case(channels=8, kernel=(3, 31), padding=(1, 15), size=(5, 11)),
    Case(channels=2, kernel=(9, 9), padding=(4, 4), size=(5, 11), batch=9, nhwc=False),
    Case(channels=2, kernel=(3, 31), padding=(1, 15), size=(5, 16), nhwc=False),
]


@pytest.mark.sanitized
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", EVERY_WIDE_KERNEL, ids=str)
def test_orders_of_wide_filters(gpu: Gpu, case: Case, order: str) -> None:
    gpu.schedule(order, late_copies=order != "reverse")
    assert_right(Run(gpu, case, torch.bfloat16), "y", "dx")


@pytest.mark.sanitized
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", EVERY_KERNEL, ids=str)
def test_orders(gpu: Gpu, case: Case, order: str) -> None:
    gpu.schedule(order, late_copies=order != "reverse")
    assert_right(Run(gpu, case, torch.float32 if case.nhwc else torch.bfloat16), "y", "dx", "dw")


def test_results_do_not_depend_on_the_order(gpu: Gpu) -> None:
    results = []
    for order in ORDERS:
        gpu.schedule(order)
        run = Run(gpu, Case(channels=8, size=(9, 19)), torch.float32)
        results.append(torch.cat([t.flatten().clone() for t in (run.forward(), run.input_grad(), *run.weight_grad())]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
def test_gradients_not_wanted_are_not_written(gpu: Gpu, nhwc: bool) -> None:
    for weight, bias in ((True, False), (False, True)):
        dw, db = Run(gpu, Case(channels=8, nhwc=nhwc), torch.float32).weight_grad(weight, bias)
        assert dw.isnan().all() != weight
        assert db.isnan().all() != bias


def test_unaligned_views_take_the_general_kernel(gpu: Gpu) -> None:
    run = Run(gpu, Case(channels=8), torch.bfloat16)
    run.x = gpu.empty(run.x.numel() + 1, dtype=torch.bfloat16)[1:].view(2, 9, 11, 8).permute(0, 3, 1, 2).copy_(run.x)
    assert run.x.data_ptr() % 16 == 2
    assert_right(run, "y", "dw")
    assert set(gpu.traffic()) == {"any_scalar", "any_weight_grad", "add_parts"}


# Bytes of the sectors that blocks touch over the bytes that cannot be avoided, with the bound that forward, input
# gradient and filter gradient must keep. What exceeds 1, by count: the filter, read by each block; the columns that
# neighbouring strips share ((16 + k - 1) / 16 of the input; strips of stride 2's gradient are 8 patches); the halo of a
# large plane's chunks; and the parts' sums, written and read again: at least 256 outputs a part, so 8 (k^2 + 1) bytes
# beside 4 * 256, for NCHW in sectors of which 4 bytes are used. Batches are large enough for the emulated GPU of 4
# multiprocessors to be filled by whole images.
TRAFFIC = [
    (Case(batch=32, channels=64, size=(16, 16)), (1.03, 1.03, 1.12)),
    (Case(batch=16, channels=64, size=(16, 32)), (1.06, 1.06, 1.12)),
    (Case(batch=32, channels=64, size=(8, 32), kernel=(7, 7), padding=(3, 3)), (1.12, 1.12, 1.55)),
    (Case(batch=32, channels=64, size=(16, 32), stride=(2, 2)), (1.03, 1.08, 1.08)),
    (Case(batch=8, channels=64, size=(16, 16), nhwc=False), (1.05, 1.05, 1.12)),
    (Case(batch=2, channels=2, size=(128, 128), nhwc=False), (1.15, 1.15, 1.25)),
    (Case(batch=8, channels=64, size=(16, 32), stride=(2, 2), nhwc=False), (1.05, 1.05, 1.12)),
]


@pytest.mark.parametrize(("case", "bounds"), TRAFFIC, ids=str)
def test_bytes_moved(gpu: Gpu, case: Case, bounds: tuple[float, float, float]) -> None:
    run = Run(gpu, case, torch.bfloat16)
    unavoidable = run.x.nbytes + run.grad.nbytes + run.weight.nbytes
    moved = []
    for call in (lambda: run.forward(with_bias=False), run.input_grad, lambda: run.weight_grad(bias=False)):
        before = gpu.moved()
        call()
        moved.append((gpu.moved() - before) / unavoidable)
    assert all(ratio <= bound for ratio, bound in zip(moved, bounds, strict=True)), moved


# The filters of 3 rows keep the test short; what exceeds 1 is the filter, read by each block, and of a map of several
# tiles the rows and columns that neighbours share: here 68 of 64 rows and, by 8, 80 of 64 columns; by 16, 96, in NCHW,
# where those make a sector.
WIDE_TRAFFIC = [
    (Case(batch=8, channels=16, size=(32, 32), kernel=(3, 13), padding=(1, 6)), 1.03),
    (Case(batch=8, channels=8, size=(32, 32), kernel=(3, 13), padding=(1, 6), nhwc=False), 1.03),
    (Case(batch=32, channels=16, size=(7, 7), kernel=(3, 13), padding=(1, 6)), 1.1),
    (Case(batch=2, channels=16, size=(64, 64), kernel=(3, 13), padding=(1, 6)), 1.17),
    (Case(batch=2, channels=8, size=(64, 64), kernel=(3, 13), padding=(1, 6), nhwc=False), 1.3),
]


@pytest.mark.parametrize(("case", "bound"), WIDE_TRAFFIC, ids=str)
def test_bytes_moved_by_wide_filters(gpu: Gpu, case: Case, bound: float) -> None:
    run = Run(gpu, case, torch.bfloat16)
    unavoidable = run.x.nbytes + run.grad.nbytes + run.weight.nbytes
    run.forward(with_bias=False)
    forward = gpu.moved()
    run.input_grad()
    ratios = (forward / unavoidable, (gpu.moved() - forward) / unavoidable)
    assert all(ratio <= bound for ratio in ratios), ratios


class LargeRun(Run):
    """Tensors of more than 2^31 elements: zeros that take no memory until they are touched, but for the last image's
    last channels, which are random; results NaN there. Only a grid's first and last blocks run."""

    def __init__(self, gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
        super().__init__(gpu, case, dtype)
        # The general kernel has 256 outputs of NCHW a block.
        gpu.kernels.schedule.first_blocks, gpu.kernels.schedule.last_blocks = 1, 8 if case.nhwc else 256

    def weight_grad(self, weight: bool = True, bias: bool = True) -> tuple[Tensor, Tensor]:
        """The parts' sums, added here: the last channels' taps are spread over the second stage's whole grid."""
        workspace = self.empty(self.gpu.kernels.weight_grad_workspace(self.geometry))
        db = self.empty(len(self.bias), dtype=self.x.dtype)
        arguments = (self.geometry, self.grad.data_ptr(), self.x.data_ptr(), 0, db.data_ptr())
        self.gpu.kernels.depthwise_weight_grad(*arguments, workspace.data_ptr(), self.number, 0)
        kh, kw = self.case.kernel
        sums = workspace.view(-1, kh * kw + 1, self.case.channels)[..., -64:].sum(0)
        return sums[:-1].t().reshape(-1, 1, kh, kw), sums[-1]

    def compared(self, x: Tensor) -> Tensor:
        return x[-1:, -64:] if x.dim() == 4 and x.shape[1] > 1 else x[-64:]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        nhwc = len(shape) == 4 and shape[1] > 1 and self.case.nhwc
        x = self.gpu.empty(*shape, dtype=dtype, nhwc=nhwc, fill=False)
        self.compared(x).fill_(float("nan"))
        return x

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        x = self.empty(*shape, dtype=dtype)
        self.compared(x).normal_()
        return x


MANY = Case(channels=64, size=(32, 32), batch=2**15 + 1)
# With many images a block of the filter's gradient, and of wide filters, would walk through thousands of them.
DEEP = Case(channels=2**31 // 25 // 64 * 64 + 128, size=(5, 5), batch=1)
WIDE_AND_DEEP = replace(DEEP, kernel=(1, 9), padding=(0, 4))
LARGE = [
    (replace(case, nhwc=nhwc), name)
    for nhwc in (True, False)
    for case, names in (
        (MANY, ("y", "dx")),
        (replace(MANY, stride=(2, 2)), ("y", "dx")),
        (replace(MANY, padding=(2, 2), dilation=(2, 2)), ("y",)),
        (DEEP, ("dw",)),
        (WIDE_AND_DEEP, ("y", "dx")),
    )
    for name in names
]


@pytest.mark.parametrize(("case", "name"), LARGE, ids=str)
def test_more_than_two_to_the_31_elements(gpu: Gpu, case: Case, name: str) -> None:
    run = LargeRun(gpu, case, torch.bfloat16)
    assert run.x.numel() > 2**31
    assert_right(run, name)
