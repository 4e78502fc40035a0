"""Wide filters on the emulated tensor cores, against PyTorch in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .conftest import ORDERS, Gpu
from .depthwise_cases import Case, Run, assert_right, moved_over_unavoidable
from .test_plan_limits import geometry, plans

# Cases of the tensor cores: several images in a tile and several tiles in an image; tiles of every number of columns;
# rows that begin at any address; padding that is a multiple of 8 or not, wide, or none; filters that are not square,
# that are even, the narrowest and the widest, and those with several pieces in their gradient; more channels than a
# block has, and fewer.
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
        ((3, 29), (1, 14), 1, (4, 96)),
        ((3, 33), (4, 24), 1, (6, 9)),
        ((35, 16), (17, 3), 2, (8, 40)),
    )
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide_filters_on_tensor_cores(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    assert_right(Run(gpu, case, dtype), "y", "dx", "dw")
    assert set(gpu.traffic()) == {"convolve_toeplitz", "filter_grad_toeplitz", "add_parts"}


def test_what_wide_filters_leave_to_the_general_kernel(gpu: Gpu) -> None:
    wide = Case(channels=8, kernel=(13, 13), padding=(6, 6), size=(14, 15), batch=1)
    for case, dtype in (
        (wide, torch.float32),
        (replace(wide, stride=(2, 2)), torch.bfloat16),
        (replace(wide, dilation=(1, 2)), torch.bfloat16),
        (replace(wide, channels=4), torch.bfloat16),
    ):
        assert_right(Run(gpu, case, dtype), "y", "dw")
    assert not [name for name in gpu.traffic() if "toeplitz" in name]


def cut(width: int, taps: int, align: int) -> tuple[int, int]:
    """Columns of a tile of the gradient and of the image. Adds one tile at a time until the image's are at most 64."""
    tiles, piece = -(-width // 32), 16 if taps <= 16 else 32
    while True:
        tile = -(-width // tiles // 8) * 8
        most = 0
        for x in range(0, width, tile):
            for first in range(0, taps, piece):
                begin = x - taps // 2 + first
                left, right = max(begin, 0) // align * align, min(begin + tile - 1 + piece, width)
                most = max(most, -(-(right - left) // 32) * 32)
        if most <= 64:
            return tile, most
        tiles += 1


def shared_for_gradient(gpu: Gpu, width: int, taps: int, nhwc: bool) -> int:
    """Shared memory of the filter gradient of one row, in elements."""
    g = geometry(gpu, 16, (1, width), (1, taps), (0, taps // 2), nhwc=nhwc)
    plan = plans(gpu, torch.bfloat16, g)["filter_grad"]
    assert plan.family.name == "toeplitz"
    return plan.shared // 2


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("taps", [9, 13, 21, 27, 29, 31])
def test_gradient_tiles_are_as_wide_as_fit(gpu: Gpu, taps: int, nhwc: bool) -> None:
    """NCHW's columns are copied in vectors of 8. So a tile of 32 may touch too many, and is 24 wide instead."""
    channels = 16 if nhwc else 8
    for width in (8, 40, 96, 100, 128, 1000, 2056):
        tile, most = cut(width, taps, align=1 if nhwc or width % 8 else 8)
        assert shared_for_gradient(gpu, width, taps, nhwc) == channels * (2 * most + 16 + tile + 16) + 32


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
def test_a_long_row_is_cut_as_a_short_one(gpu: Gpu, nhwc: bool) -> None:
    """A planner that tried one tile more each time took minutes for a row of 10,000,000 columns."""
    assert shared_for_gradient(gpu, 10_000_000, 21, nhwc) == shared_for_gradient(gpu, 1000, 21, nhwc)


# One case for each kernel, with several tiles or images.
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
    assert_right(Run(gpu, case, torch.bfloat16), "y", "dx", "dw")


def test_gradient_is_the_same_in_any_order(gpu: Gpu) -> None:
    results = []
    for order in ORDERS:
        gpu.schedule(order)
        run = Run(gpu, Case(channels=8, kernel=(13, 13), padding=(6, 6), size=(14, 15), batch=9), torch.float16)
        results.append(torch.cat([t.flatten().clone() for t in run.weight_grad()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
def test_gradients_not_wanted_are_not_written(gpu: Gpu, nhwc: bool) -> None:
    case = Case(channels=8, kernel=(9, 9), padding=(4, 4), nhwc=nhwc)
    for weight, bias in ((True, False), (False, True)):
        dw, db = Run(gpu, case, torch.bfloat16).weight_grad(weight, bias)
        for grad, wanted in ((dw, weight), (db, bias)):
            assert not grad.isnan().any() if wanted else grad.isnan().all()


def test_unaligned_views_take_the_general_kernel(gpu: Gpu) -> None:
    run = Run(gpu, Case(channels=8, kernel=(9, 9), padding=(4, 4)), torch.bfloat16)
    run.x = gpu.empty(run.x.numel() + 1, dtype=torch.bfloat16)[1:].view(2, 9, 11, 8).permute(0, 3, 1, 2).copy_(run.x)
    assert_right(run, "y", "dw")
    assert set(gpu.traffic()) == {"any_scalar", "any_filter_grad", "add_parts"}


# Bounds of forward, data gradient and filter gradient. Filters of 3 rows keep the test short. The excess over 1 is the
# filter, read by each block, and in maps of several tiles the rows and columns that neighbours share: here 68 for 64
# rows, and 80 for 64 columns in steps of 8. In NCHW the step is 16 columns, a sector, which makes 96. The filter's
# gradient reads 76 for 64 columns (96 in NCHW) and only the rows of its image. It adds the sums of the parts, up to an
# eighth of what it reads, and the result itself. Parts have the channels side by side, so a block writes 2 taps of 16
# channels (4 of 8), each to its own sector: 16 sectors a block, 10 kB in all. That is 0.02 of 525 kB, and 0.1 of the
# 100 kB of 7 x 7 maps.
WIDE_TRAFFIC = [
    (Case(batch=8, channels=16, size=(32, 32), kernel=(3, 13), padding=(1, 6)), (1.03, 1.03, 1.10)),
    (Case(batch=8, channels=8, size=(32, 32), kernel=(3, 13), padding=(1, 6), nhwc=False), (1.03, 1.03, 1.10)),
    (Case(batch=32, channels=16, size=(7, 7), kernel=(3, 13), padding=(1, 6)), (1.1, 1.1, 1.20)),
    (Case(batch=2, channels=16, size=(64, 64), kernel=(3, 13), padding=(1, 6)), (1.17, 1.17, 1.23)),
    (Case(batch=2, channels=8, size=(64, 64), kernel=(3, 13), padding=(1, 6), nhwc=False), (1.3, 1.3, 1.36)),
]


@pytest.mark.parametrize(("case", "bounds"), WIDE_TRAFFIC, ids=str)
def test_bytes_moved_by_wide_filters(gpu: Gpu, case: Case, bounds: tuple[float, float, float]) -> None:
    moved = moved_over_unavoidable(gpu, case)
    assert all(ratio <= bound for ratio, bound in zip(moved, bounds, strict=True)), moved
