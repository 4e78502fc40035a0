"""The register kernels (fp32 NHWC, and 16 bits at 3 x 3) on the emulated GPU, against PyTorch in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .conftest import DTYPES, ORDERS, Gpu
from .depthwise_cases import ACTIVATIONS, Case, Run, assert_activated, assert_right

CONVOLUTION, FILTER, BOTH = "convolve_registers", "filter_grad_registers", "both_grads_registers"
PAIRS = "stride2_grad_registers"

# Maps narrower and wider than a thread's columns, and no multiple of them; several chunks of rows and several blocks of
# channels; wide padding and none; filters that are rounded up; dilations, one of them wider than the map.
CASES = [
    Case(channels=c, kernel=kernel, size=size, padding=padding, stride=(s, s), dilation=dilation, batch=n)
    for kernel, padding, s, dilation, n, c, size in (
        ((3, 3), (1, 1), 1, (1, 1), 2, 36, (9, 19)),
        ((3, 3), (0, 0), 1, (1, 1), 1, 2, (7, 3)),
        ((3, 3), (3, 3), 1, (1, 1), 3, 6, (5, 4)),
        ((3, 3), (2, 3), 1, (2, 3), 2, 4, (9, 11)),
        ((3, 3), (12, 12), 1, (12, 12), 1, 2, (5, 6)),
        ((3, 1), (0, 0), 1, (1, 1), 2, 6, (7, 5)),
        ((2, 2), (1, 0), 1, (1, 1), 2, 4, (6, 5)),
        ((3, 3), (1, 1), 2, (1, 1), 2, 36, (9, 19)),
        ((3, 3), (0, 2), 2, (1, 1), 3, 4, (8, 6)),
        ((3, 3), (1, 1), 2, (1, 1), 3, 36, (7, 4)),
        ((3, 3), (4, 5), 1, (4, 5), 2, 6, (9, 10)),
        ((5, 5), (2, 2), 1, (1, 1), 1, 18, (10, 21)),
        ((5, 5), (4, 8), 1, (2, 4), 1, 2, (9, 10)),
        ((4, 5), (1, 2), 2, (1, 1), 2, 6, (11, 6)),
        ((5, 5), (2, 2), 2, (1, 1), 1, 18, (9, 12)),
        ((7, 7), (3, 3), 1, (1, 1), 1, 20, (11, 17)),
        ((3, 7), (1, 0), 1, (1, 1), 1, 4, (5, 9)),
        ((7, 7), (3, 2), 2, (1, 1), 2, 6, (12, 13)),
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(gpu: Gpu, case: Case) -> None:
    assert_right(Run(gpu, case, torch.float32), "y", "dx", "dw")
    gradient = CONVOLUTION if case.stride == (1, 1) else PAIRS
    assert set(gpu.traffic()) == {CONVOLUTION, gradient, FILTER, "add_parts"}


# Narrow maps, with filters that `rows` does not serve there.
NARROW = [
    Case(channels=c, kernel=kernel, size=size, padding=(p, p), stride=(s, s), batch=n)
    for kernel, p, s, n, c, size in (
        ((3, 3), 1, 1, 5, 12, (4, 4)),
        ((3, 3), 0, 1, 2, 68, (9, 3)),
        ((3, 2), 1, 1, 2, 4, (5, 3)),
        ((3, 3), 1, 2, 3, 12, (4, 4)),
        ((3, 3), 2, 2, 2, 8, (5, 1)),
        ((7, 7), 3, 1, 5, 12, (4, 4)),
        ((5, 5), 2, 1, 2, 4, (6, 3)),
    )
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", NARROW, ids=str)
def test_16_bits_of_narrow_maps(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    assert_right(Run(gpu, case, dtype), "y", "dx", "dw")
    gradient = CONVOLUTION if case.stride == (1, 1) else PAIRS
    assert set(gpu.traffic()) == {CONVOLUTION, gradient, FILTER, "add_parts"}


BOTH_CASES = [
    (Case(channels=36, size=(9, 19)), torch.float32),
    (Case(channels=2, size=(1, 1), batch=3), torch.float32),
    (Case(channels=4, size=(13, 10), padding=(2, 3), dilation=(2, 3), batch=1), torch.float32),
    (Case(channels=12, size=(4, 4), batch=5), torch.bfloat16),
    (Case(channels=8, size=(3, 4), batch=40), torch.float16),
]


@pytest.mark.parametrize(("case", "dtype"), BOTH_CASES, ids=str)
def test_both_gradients_in_one_pass(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    assert_right(Run(gpu, case, dtype), "both")
    assert set(gpu.traffic()) == {BOTH, "add_parts"}


def test_both_gradients_where_one_pass_does_not_serve(gpu: Gpu) -> None:
    case = Case(channels=4)
    for other in (replace(case, padding=(0, 0)), replace(case, stride=(2, 2)), replace(case, kernel=(5, 5))):
        assert_right(Run(gpu, other, torch.float32), "both")
    assert BOTH not in gpu.traffic()


@pytest.mark.parametrize("activation", range(1, len(ACTIVATIONS) + 1))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation(gpu: Gpu, dtype: torch.dtype, activation: int) -> None:
    assert_activated(Run(gpu, Case(channels=4, size=(5, 4)), dtype), activation)


# One case for each kernel whose threads wait for each other: filters in shared memory, and a block's sums.
EVERY_KERNEL = [
    (Case(channels=34, size=(9, 6)), "both"),
    (Case(channels=2, kernel=(5, 5), padding=(2, 2), size=(9, 6)), "y"),
    (Case(channels=2, kernel=(5, 5), padding=(2, 2), stride=(2, 2), size=(9, 6)), "dx"),
    (Case(channels=34, kernel=(7, 7), padding=(3, 3), size=(9, 6)), "dw"),
]


@pytest.mark.sanitized
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("case", "name"), EVERY_KERNEL, ids=str)
def test_orders(gpu: Gpu, case: Case, name: str, order: str) -> None:
    gpu.schedule(order)
    assert_right(Run(gpu, case, torch.float32), name)


def test_results_do_not_depend_on_the_order(gpu: Gpu) -> None:
    results = []
    for order in ORDERS:
        gpu.schedule(order)
        run = Run(gpu, Case(channels=4, size=(9, 19)), torch.float32)
        results.append(torch.cat([t.flatten().clone() for t in (run.forward(), *run.both_grads(), *run.weight_grad())]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_registers_leave_to_the_general_kernel(gpu: Gpu) -> None:
    case = Case(channels=4)
    for other in (
        replace(case, channels=3),
        replace(case, stride=(1, 2)),
        replace(case, stride=(2, 2), dilation=(2, 2), padding=(2, 2)),
        replace(case, kernel=(1, 5)),
        replace(case, kernel=(9, 9), padding=(4, 4)),
    ):
        assert_right(Run(gpu, other, torch.float32), "y")
    assert not [name for name in gpu.traffic() if "registers" in name]


# Bytes of the sectors that blocks touch over those that cannot be avoided, for forward, data gradient, filter gradient,
# and both gradients over the three tensors of one pass. Only 3 x 3 at stride 1 has such a pass; two kernels move four
# tensors. Otherwise the excess over 1 is the filter, read by each block, the columns and rows that neighbouring blocks
# share, and the sums of the parts.
TRAFFIC = [
    (Case(batch=16, channels=32, size=(16, 32)), (1.02, 1.02, 1.04, 1.07)),
    (Case(batch=8, channels=32, size=(16, 32), kernel=(7, 7), padding=(3, 3)), (1.03, 1.03, 1.1, 1.42)),
    (Case(batch=16, channels=32, size=(32, 32), stride=(2, 2)), (1.02, 1.03, 1.11, 1.19)),
]


@pytest.mark.parametrize(("case", "bounds"), TRAFFIC, ids=str)
def test_bytes_moved(gpu: Gpu, case: Case, bounds: tuple[float, ...]) -> None:
    run = Run(gpu, case, torch.float32)
    image, output, filter_ = run.x.nbytes, run.grad.nbytes, run.weight.nbytes
    moved = []
    for call, unavoidable in (
        (lambda: run.forward(with_bias=False), image + output + filter_),
        (run.input_grad, image + output + filter_),
        (lambda: run.weight_grad(bias=False), image + output + filter_),
        (lambda: run.both_grads(bias=False), 2 * image + output + 2 * filter_),
    ):
        before = gpu.moved()
        call()
        moved.append((gpu.moved() - before) / unavoidable)
    assert all(ratio <= bound for ratio, bound in zip(moved, bounds, strict=True)), moved
