"""Data and filter gradient in one pass on the emulated GPU, against PyTorch in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .conftest import DTYPES, ORDERS, Gpu
from .depthwise_cases import Case, Run, assert_right

KERNELS = {"backward_nhwc_kernel", "add_parts"}

# Maps narrower than a thread's pixels and than a strip, of several strips, the last one not full; rows that are no
# multiple of a step; slices that begin and end within an image; channels that do not fill a block.
ONE_PASS = [
    Case(channels=c, size=size, batch=n)
    for c, n, size in (
        (72, 2, (9, 19)),
        (8, 5, (7, 3)),
        (64, 1, (1, 1)),
        (24, 3, (5, 33)),
        (8, 40, (13, 16)),
        (136, 2, (4, 12)),
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ONE_PASS, ids=str)
def test_one_pass(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    assert_right(Run(gpu, case, dtype), "both")
    assert set(gpu.traffic()) == KERNELS


@pytest.mark.sanitized
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_orders_of_one_pass(gpu: Gpu, order: str, dtype: torch.dtype) -> None:
    gpu.schedule(order, late_copies=order != "reverse")
    assert_right(Run(gpu, Case(channels=8, size=(13, 18)), dtype), "both")


def test_results_do_not_depend_on_the_order(gpu: Gpu) -> None:
    results = []
    for order in ORDERS:
        gpu.schedule(order)
        run = Run(gpu, Case(channels=8, size=(9, 19)), torch.float32)
        results.append(torch.cat([t.flatten().clone() for t in run.both_grads()]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_bias_that_is_not_wanted_is_not_written(gpu: Gpu) -> None:
    dx, dw, db = Run(gpu, Case(channels=8), torch.bfloat16).both_grads(bias=False)
    assert db.isnan().all()
    assert not dx.isnan().any()
    assert not dw.isnan().any()


def test_what_is_left_to_two_kernels(gpu: Gpu) -> None:
    case = Case(channels=8)
    for other in (
        replace(case, kernel=(5, 5), padding=(2, 2)),
        replace(case, padding=(0, 0)),
        replace(case, padding=(1, 2)),
        replace(case, stride=(2, 2)),
        replace(case, dilation=(2, 2), padding=(2, 2)),
        replace(case, channels=12),
        replace(case, nhwc=False),
    ):
        assert_right(Run(gpu, other, torch.bfloat16), "both")
    run = Run(gpu, case, torch.bfloat16)
    run.grad = gpu.empty(run.grad.numel() + 1, dtype=torch.bfloat16)[1:].view(2, 9, 11, 8).permute(0, 3, 1, 2)
    run.grad.copy_(torch.randn_like(run.x))
    assert_right(run, "both")
    assert "backward_nhwc_kernel" not in gpu.traffic()


RULES = [
    (Case(channels=8), torch.float32, ("nhwc", "one_pass", "one_pass")),
    (Case(channels=8, kernel=(5, 5)), torch.float16, ("nhwc", "nhwc", "nhwc")),
    (Case(channels=3, stride=(2, 2), nhwc=False), torch.float32, ("nchw", "nchw", "nchw")),
    (Case(channels=8, kernel=(31, 31), padding=(15, 15)), torch.bfloat16, ("tensor_cores",) * 3),
    (Case(channels=3, kernel=(9, 9), padding=(4, 4), nhwc=False), torch.float16, ("tensor_cores",) * 3),
    (Case(channels=8, kernel=(9, 9), padding=(4, 4)), torch.float32, ("general", "general", "general")),
    (Case(channels=12), torch.bfloat16, ("general", "general", "general")),
]


@pytest.mark.parametrize(("case", "dtype", "names"), RULES, ids=str)
def test_kernels_asked_for_are_those_that_run(gpu: Gpu, case: Case, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    run = Run(gpu, case, dtype)
    told = gpu.kernels.depthwise_kernels(run.geometry, run.number)
    assert (told.forward.name, told.input_grad.name, told.weight_grad.name) == names
    assert not gpu.traffic()  # asking launches nothing
    run.forward()
    run.both_grads()
    of = {"general": "any_", "nhwc": "_nhwc_", "nchw": "_nchw_", "tensor_cores": "_toeplitz_", "one_pass": "backward_"}
    for name in set(gpu.traffic()) - {"add_parts"}:
        assert any(of[expected] in name for expected in names), name


# Over image, both gradients and filter: 3 tensors where two kernels move 4. What exceeds 1, by count: of the gradient,
# the columns that neighbouring strips share, 18 of 16, and the rows of a slice's neighbours; the parts' sums.
TRAFFIC = [
    (Case(batch=32, channels=64, size=(16, 16)), 1.07),
    (Case(batch=16, channels=64, size=(16, 64)), 1.07),
    (Case(batch=32, channels=64, size=(7, 7)), 1.12),
]


@pytest.mark.parametrize(("case", "bound"), TRAFFIC, ids=str)
def test_bytes_moved_by_one_pass(gpu: Gpu, case: Case, bound: float) -> None:
    run = Run(gpu, case, torch.bfloat16)
    run.both_grads(bias=False)
    unavoidable = run.x.nbytes + run.grad.nbytes + run.x.nbytes + 2 * run.weight.nbytes
    assert gpu.moved() <= bound * unavoidable, gpu.moved() / unavoidable
