"""The row pipeline of csrc/cuda (16 bits, NHWC, filters up to 7 x 7) on the emulated GPU, against PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch

from .conftest import ORDERS, Gpu
from .depthwise_cases import Case, Run, assert_right, moved_over_unavoidable

HALVES = (torch.bfloat16, torch.float16)
KERNELS = {
    "y": {"rows_convolution"},
    "dx": {"rows_convolution", "rows_stride2_data_grad"},
    "dw": {"rows_filter_grad"},
    "both": {"rows_both_grads"},
}


def square(k: int, **rest: object) -> Case:
    return Case(kernel=(k, k), **{"padding": (k // 2, k // 2), **rest})  # type: ignore[arg-type]


# Strips that end in an image, between images and in the middle of the batch; channels that do not fill a block; chunks
# of rows; every compiled filter, filters rounded up to one, and all strides and dilations.
STRIDE_1 = [
    square(3, channels=72, size=(7, 7), batch=5),
    square(3, channels=8, size=(13, 19), batch=3),
    square(3, channels=24, size=(12, 33), batch=3, padding=(0, 0)),
    square(3, channels=16, padding=(2, 0)),
    square(3, channels=8, size=(8, 8), batch=70),
    square(3, channels=8, size=(40, 70), batch=1),
    square(3, channels=8, size=(15, 33), batch=3, padding=(2, 2), dilation=(2, 2)),
    square(3, channels=8, size=(33, 33), padding=(12, 12), dilation=(12, 12)),
    square(3, channels=8, size=(33, 33), padding=(18, 18), dilation=(18, 18), batch=1),
    square(3, channels=8, size=(21, 11), padding=(3, 1), dilation=(3, 1), batch=3),
    square(5, channels=40, size=(14, 14), batch=3, padding=(1, 2)),
    square(5, channels=8, size=(21, 23), padding=(4, 4), dilation=(2, 2)),
    square(7, channels=8, size=(17, 56)),
    square(7, channels=48, size=(8, 8), batch=5),
    square(7, channels=8, size=(17, 19), padding=(6, 6), dilation=(2, 2)),
    *(
        Case(channels=8, kernel=kernel, size=(10, 14), padding=padding, batch=3)
        for kernel, padding in (
            ((3, 7), (1, 3)), ((7, 3), (0, 0)), ((2, 2), (0, 0)), ((1, 3), (0, 1)), ((3, 1), (0, 0)), ((4, 6), (2, 3)),
        )
    ),
]  # fmt: skip
STRIDE_2 = [
    square(3, channels=24, stride=(2, 2), size=(19, 21)),
    square(3, channels=8, stride=(2, 2), size=(16, 16), batch=3),
    square(3, channels=8, stride=(2, 2), size=(23, 70), padding=(0, 0), batch=1),
    square(5, channels=8, stride=(2, 2), size=(22, 37), padding=(1, 2)),
    square(7, channels=8, stride=(2, 2), size=(23, 37)),
    Case(channels=8, kernel=(2, 2), stride=(2, 2), size=(10, 14), padding=(0, 0)),
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", STRIDE_1 + STRIDE_2, ids=str)
def test_results(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    for name in ("y", "dx", "dw", *(["both"] if case.kernel == (3, 3) and case.stride == (1, 1) else [])):
        gpu.kernels.reset()
        assert_right(Run(gpu, case, dtype), name)
        middle = all(p <= d for p, d in zip(case.padding, case.dilation, strict=True))
        kernels = KERNELS[name] if name != "both" or middle else KERNELS["dx"] | KERNELS["dw"]
        assert set(gpu.traffic()) - {"add_parts"} <= kernels, f"{name} was made by {set(gpu.traffic())}"


ONE_EACH = [
    square(3, channels=72, size=(8, 19)),
    square(3, channels=8, size=(9, 33), padding=(4, 4), dilation=(4, 4)),
    square(3, channels=8, stride=(2, 2), size=(17, 23)),
    square(5, channels=8, stride=(2, 2), size=(17, 23)),
    square(7, channels=8, size=(9, 40), batch=1),
]


@pytest.mark.sanitized
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_orders(gpu: Gpu, case: Case, order: str) -> None:
    """Results are right for any order of warps, and whether a cp.async lands at once or at its wait."""
    gpu.schedule(order, late_copies=order != "reverse")
    assert_right(Run(gpu, case, torch.bfloat16), "y", "dx", "dw", "both")


def test_results_do_not_depend_on_the_order(gpu: Gpu) -> None:
    results = []
    for order in ORDERS:
        gpu.schedule(order)
        run = Run(gpu, square(3, channels=16, size=(9, 19), batch=3), torch.bfloat16)
        results.append(torch.cat([t.flatten().clone() for t in (run.forward(), *run.weight_grad(), *run.both_grads())]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_an_infinity_stays_in_its_group_and_window(gpu: Gpu) -> None:
    """The documented rule: within the filter's window the seven other channels of a group of eight get NaN, and nothing
    beyond does. The channel itself gets what PyTorch gives."""
    run = Run(gpu, square(3, channels=24, size=(9, 19)), torch.bfloat16)
    clean = run.forward().clone()
    run.x[1, 10, 4, 7] = float("inf")
    y = run.forward().clone()
    within = torch.zeros_like(y, dtype=torch.bool)
    within[1, 8:16, 3:6, 6:9] = True
    assert torch.equal(y[~within], clean[~within])
    assert not y[within].isfinite().any()
    assert torch.equal(y[1, 10, 3:6, 6:9].double().isinf(), run.reference()[0][1, 10, 3:6, 6:9].isinf())


def test_the_largest_finite_numbers_stay_finite(gpu: Gpu) -> None:
    run = Run(gpu, square(3, channels=8, size=(9, 19)), torch.bfloat16)
    run.x.fill_(torch.finfo(torch.bfloat16).max)
    run.weight.zero_()
    run.weight[:, 0, 1, 1] = 1
    run.bias.zero_()
    assert torch.equal(run.forward(), run.x)


# Bytes of the sectors that blocks touch over the bytes that cannot be avoided, for forward, data gradient and filter
# gradient. By count, the excess over 1 is the filter, read by each block; the columns that neighbouring strips share;
# the rows that neighbouring chunks share; and the sums of the parts, written and read again.
TRAFFIC = [
    (square(3, batch=64, channels=64, size=(8, 8)), (1.05, 1.05, 1.2)),
    (square(3, batch=8, channels=64, size=(32, 32)), (1.15, 1.15, 1.2)),
    (square(7, batch=8, channels=32, size=(32, 32)), (1.35, 1.35, 1.6)),
    (square(3, batch=16, channels=64, size=(32, 32), stride=(2, 2)), (1.1, 1.1, 1.15)),
]


@pytest.mark.parametrize(("case", "bounds"), TRAFFIC, ids=str)
def test_bytes_moved(gpu: Gpu, case: Case, bounds: tuple[float, float, float]) -> None:
    moved = moved_over_unavoidable(gpu, case)
    assert all(ratio <= bound for ratio, bound in zip(moved, bounds, strict=True)), moved
