"""The depthwise kernels of csrc/cuda on the emulated GPU, against PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_rounded

from .conftest import DTYPES, ORDERS, Gpu
from .depthwise_cases import ACTIVATIONS, MOST_TERMS, Case, Run, assert_activated, assert_right, moved_over_unavoidable

# What no fast path covers: dilation, two different strides, even kernels, channels that fill no vector, large kernels.
GENERAL = [
    Case(channels=5, kernel=(2, 4), stride=(1, 3), padding=(0, 2)),
    Case(channels=24, kernel=(3, 3), padding=(2, 2), dilation=(2, 2)),
    Case(channels=24, kernel=(3, 5), stride=(2, 1), padding=(4, 3), dilation=(3, 2), size=(12, 9)),
    Case(channels=72, kernel=(1, 3), padding=(0, 0), size=(3, 3)),
    Case(channels=3, kernel=(1, 1), padding=(0, 0), batch=3),
    Case(channels=4, kernel=(3, 2), stride=(3, 2), nhwc=False),
    Case(channels=2, kernel=(3, 5), stride=(2, 1), padding=(4, 3), dilation=(3, 2), size=(12, 9), nhwc=False),
]
# Sliding windows: rows of several groups of outputs, with every remainder, and rows shorter than a group; as many
# residues of a dilation as the row has columns; more and fewer taps than the filter's gradient has sums, in both
# directions; filter rows that enter shared memory in several steps.
GENERAL += [
    Case(channels=c, kernel=kernel, size=size, padding=padding, dilation=dilation, batch=n)
    for c, kernel, padding, dilation, n, size in (
        (40, (9, 9), (4, 4), (1, 1), 2, (10, 19)),
        (8, (11, 17), (5, 8), (1, 1), 3, (7, 16)),
        (8, (3, 33), (4, 24), (1, 1), 1, (6, 9)),
        (8, (35, 16), (17, 3), (1, 1), 1, (8, 40)),
        (8, (2, 9), (0, 16), (1, 4), 2, (3, 18)),
        (36, (5, 3), (8, 30), (4, 30), 1, (9, 12)),
        (3, (9, 10), (4, 0), (1, 1), 2, (6, 21)),
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GENERAL, ids=str)
def test_general(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    assert_right(Run(gpu, case, dtype), "y", "dx", "dw")


# Several planes in a block and several blocks in a plane; rows that begin at any address. Padding wider than the
# filter: blocks whose rows all lie above or below the image, here the tensor's last image.
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
        (3, 5, 1, 1, (257, 257)),
        (3, 7, 1, 1, (101, 101)),
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NCHW, ids=str)
def test_nchw(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    run = Run(gpu, case, dtype)
    assert_right(run, "y", "dx", "dw")
    gradient = "convolve_planes" if case.stride == (1, 1) else "stride2_grad_planes"
    assert set(gpu.traffic()) == {"convolve_planes", gradient, "filter_grad_planes", "add_parts"}


# One case for each place in the code that applies an activation.
ACTIVATED = [
    (Case(channels=8, kernel=(2, 3)), torch.bfloat16),
    (Case(channels=3, kernel=(2, 3)), torch.float32),
    (Case(channels=3, nhwc=False), torch.float16),
    (Case(channels=8, kernel=(3, 9), padding=(1, 4)), torch.bfloat16),
]


@pytest.mark.parametrize("activation", range(1, len(ACTIVATIONS) + 1))
@pytest.mark.parametrize(("case", "dtype"), ACTIVATED, ids=str)
def test_activation(gpu: Gpu, case: Case, dtype: torch.dtype, activation: int) -> None:
    assert_activated(Run(gpu, case, dtype), activation)


def test_general_with_the_largest_filter(gpu: Gpu) -> None:
    run = Run(gpu, Case(channels=8, kernel=(31, 31), padding=(15, 15), batch=1, size=(5, 9)), torch.float32)
    assert_right(run, "y", "dx")
    assert set(gpu.traffic()) == {"any_vectors"}


# One case for each kernel, with several strips, chunks or steps.
EVERY_KERNEL = [
    Case(channels=8, kernel=(2, 3), size=(5, 4)),
    Case(channels=4, kernel=(3, 9), padding=(1, 4), size=(5, 12)),
    Case(channels=3, kernel=(2, 3), size=(5, 4)),
    Case(channels=3, size=(13, 18), nhwc=False),
    Case(channels=1, kernel=(7, 7), stride=(2, 2), padding=(3, 3), size=(150, 90), batch=1, nhwc=False),
]


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
        for grad, wanted in ((dw, weight), (db, bias)):
            assert not grad.isnan().any() if wanted else grad.isnan().all()


# Large planes are summed in several pieces each.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(), Case(nhwc=False), Case(channels=2, size=(70, 171), nhwc=False)], ids=str)
def test_of_a_frozen_filter_the_image_is_not_read(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    """The bias's gradient is a sum of gradients, and the image's gradient has its own kernel."""
    run = Run(gpu, case, dtype)
    exact, magnitude = (g.double().sum((0, 2, 3)) for g in (run.grad, run.grad.abs()))
    expected_dx = run.input_grad()
    run.x.fill_(torch.nan)
    _, alone = run.weight_grad(weight=False)
    dx, db = run.empty(*expected_dx.shape, dtype=dtype), run.empty(case.channels, dtype=dtype)
    run.backward(dx, None, db)
    assert_rounded(db, exact, magnitude, MOST_TERMS)
    assert torch.equal(db, alone)
    assert torch.equal(dx, expected_dx)
    assert gpu.traffic()["sum_rows" if case.nhwc else "sum_planes"].launches == 2
    assert not any("filter_grad" in name or "both_grads" in name for name in gpu.traffic())


def test_unaligned_views_take_the_general_kernel(gpu: Gpu) -> None:
    run = Run(gpu, Case(channels=8), torch.bfloat16)
    run.x = gpu.empty(run.x.numel() + 1, dtype=torch.bfloat16)[1:].view(2, 9, 11, 8).permute(0, 3, 1, 2).copy_(run.x)
    assert run.x.data_ptr() % 16 == 2
    assert_right(run, "y", "dw")
    assert set(gpu.traffic()) == {"any_scalar", "any_filter_grad", "add_parts"}


# One case for each family and layout.
PARAMETERS_ANYWHERE = [
    Case(channels=24),
    Case(channels=24, kernel=(7, 7), padding=(3, 3)),
    Case(channels=24, stride=(2, 2)),
    Case(channels=24, padding=(2, 2), dilation=(2, 2)),
    Case(channels=24, kernel=(2, 4)),
    Case(channels=24, kernel=(13, 13), padding=(6, 6)),
    Case(channels=8, nhwc=False),
    Case(channels=8, stride=(2, 2), nhwc=False),
    Case(channels=8, kernel=(13, 13), padding=(6, 6), size=(12, 16), nhwc=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PARAMETERS_ANYWHERE, ids=str)
def test_parameters_may_begin_anywhere(gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
    """Parameters may be views into one buffer. They get the kernels and the bits of aligned parameters."""

    def results(offset: int) -> tuple[list[torch.Tensor], dict[str, int]]:
        gpu.kernels.reset()
        run = Run(gpu, case, dtype)
        for name in ("weight", "bias"):
            aligned = getattr(run, name)
            moved = gpu.empty(aligned.numel() + offset, dtype=dtype)[offset:].view(aligned.shape).copy_(aligned)
            assert moved.data_ptr() % 16 == offset * dtype.itemsize
            setattr(run, name, moved)
        assert_right(run, "y")
        made = [run.forward(), run.input_grad(), *run.weight_grad(), *run.both_grads()]
        return [t.clone() for t in made], {name: traffic.launches for name, traffic in gpu.traffic().items()}

    aligned, kernels = results(0)
    moved, launched = results(1)
    assert launched == kernels
    assert all(map(torch.equal, moved, aligned))


# Bytes of the sectors that blocks touch over the bytes that cannot be avoided, with the bounds for forward, input
# gradient and filter gradient. By count, the excess over 1 is the filter, read by each block; the halo of a large
# plane's chunks; and the sums of the parts, written and read again. A part has at least 256 outputs, so that is
# 8 (k^2 + 1) bytes beside 4 * 256, in sectors of which a block fills 4 bytes. The batches are large enough for whole
# images to fill the emulated GPU's 4 multiprocessors.
TRAFFIC = [
    (Case(batch=8, channels=64, size=(16, 16), nhwc=False), (1.05, 1.05, 1.12)),
    (Case(batch=2, channels=2, size=(128, 128), nhwc=False), (1.15, 1.15, 1.25)),
    (Case(batch=8, channels=64, size=(16, 32), stride=(2, 2), nhwc=False), (1.05, 1.05, 1.12)),
]


@pytest.mark.parametrize(("case", "bounds"), TRAFFIC, ids=str)
def test_bytes_moved(gpu: Gpu, case: Case, bounds: tuple[float, float, float]) -> None:
    moved = moved_over_unavoidable(gpu, case)
    assert all(ratio <= bound for ratio, bound in zip(moved, bounds, strict=True)), moved


# The general kernels rely on the caches for rows that blocks share, which the count by blocks does not see. A block of
# vectors has 32 groups of 4 outputs, here 4 rows. It also reads the 2 rows that the dilated filter reaches above and
# below them: 8 for 4. A block of scalars has 256 outputs, 8 rows, and reads 12. The filter's gradient reads both
# tensors once for all 9 taps.
GENERAL_TRAFFIC = [
    (Case(batch=4, channels=64, size=(32, 32), padding=(2, 2), dilation=(2, 2)), (1.55, 1.55, 1.2)),
    (Case(batch=4, channels=8, size=(32, 32), padding=(2, 2), dilation=(2, 2), nhwc=False), (1.25, 1.25, 1.2)),
]


@pytest.mark.parametrize(("case", "bounds"), GENERAL_TRAFFIC, ids=str)
def test_bytes_moved_by_the_general_kernels(gpu: Gpu, case: Case, bounds: tuple[float, float, float]) -> None:
    moved = moved_over_unavoidable(gpu, case)
    assert all(ratio <= bound for ratio, bound in zip(moved, bounds, strict=True)), moved


class Spoilt(Run):
    """Its smallest output is off by 3 %, which is little beside the terms that were added up to it."""

    def forward(self, with_bias: bool = True, activation: int = 0) -> torch.Tensor:
        y = super().forward(with_bias, activation)
        return y.mul_(torch.where(y.abs() == y.abs().min(), 1.03, 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bound_is_one_rounding_of_the_value(gpu: Gpu, dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match=r"1 of \d+ values off"):
        assert_right(Spoilt(gpu, Case(), dtype), "y")
