"""Plans of the benchmarks' shapes for several GPUs. Only the kernels' host functions run; nothing is launched."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.shapes import SHAPES, Shape, select

from .conftest import Gpu

# Capability; multiprocessors; bytes of shared memory that a block may ask for and that a multiprocessor has; threads
# and blocks that run on a multiprocessor at once.
DEVICES = {
    "H200": (90, 132, 227 << 10, 228 << 10, 2048, 32),
    "A100": (80, 108, 163 << 10, 164 << 10, 2048, 32),
    "L4": (89, 58, 99 << 10, 100 << 10, 1536, 24),
}


def geometry(gpu: Gpu, shape: Shape, nhwc: bool, **changes: int) -> Any:
    case = shape.case("depthwise", device="cuda")
    out_h, out_w = (
        (i + 2 * case.padding - case.dilation * (k - 1) - 1) // case.stride + 1
        for i, k in ((case.height, case.kernel), (case.width, case.filter_width))
    )
    pairs = {name: getattr(case, name) for name in ("stride", "padding", "dilation")}
    numbers = dict(
        batch=case.batch, channels=case.channels, in_h=case.height, in_w=case.width, out_h=out_h, out_w=out_w,
        kernel_h=case.kernel, kernel_w=case.filter_width, nhwc=nhwc,
        **{f"{name}_{axis}": value for name, value in pairs.items() for axis in "hw"},
    )  # fmt: skip
    return gpu.kernels.Conv2d(**numbers | changes)


def plans(gpu: Gpu, shape: Shape, dtype: str, nhwc: bool, device: str) -> dict[str, Any]:
    """The plan of each result that has one."""
    kernels, g = gpu.kernels, geometry(gpu, shape, nhwc)
    facts, number = kernels.Device(*DEVICES[device]), getattr(kernels.Dtype, dtype)
    results = {name: getattr(kernels.Result, name) for name in ("output", "data_grad", "filter_grad", "both_grads")}
    made = {name: kernels.plan_result(result, g, number, True, facts) for name, result in results.items()}
    return {name: plan for name, plan in made.items() if plan is not None}


def expected_families(shape: Shape, dtype: str, nhwc: bool) -> set[str]:
    wide = max(shape.kernel, shape.kernel_width or 0) > 7
    if wide:
        return {"general"} if dtype == "f32" else {"toeplitz"}
    if nhwc:
        if dtype == "f32" or ((shape.width or shape.size) <= 4 and shape.kernel <= 3):
            return {"registers"}
        return {"rows", "registers"}  # registers where a strip of rows has no room for the halo
    square = shape.kernel_width in (None, shape.kernel)
    return {"planes"} if square and shape.dilation == 1 else {"general"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_families_and_shared_memory(gpu: Gpu, dtype: str, nhwc: bool, device: str) -> None:
    limit = DEVICES[device][2]
    for shape in SHAPES:
        for result, plan in plans(gpu, shape, dtype, nhwc, device).items():
            told = f"{shape.id}, {result}: {plan.family.name}, {plan.shared} bytes, {plan.blocks} x {plan.threads}"
            assert plan.shared <= limit, told
            assert plan.blocks > 0, told
            assert 0 < plan.threads <= 1024, told
            # Where a block may have less shared memory, families that take less may serve more shapes.
            fallback = set() if device == "H200" else {"registers", "general"}
            assert plan.family.name in expected_families(shape, dtype, nhwc) | fallback, told


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_an_empty_convolution_has_a_plan_too(gpu: Gpu, dtype: str, nhwc: bool) -> None:
    # Whoever asks how a call would run may ask for an empty batch too. There a family would divide by its images.
    kernels, device = gpu.kernels, gpu.kernels.Device(*DEVICES["H200"])
    for shape in SHAPES:
        for empty in ("batch", "channels"):
            g = geometry(gpu, shape, nhwc, **{empty: 0})
            for result in (kernels.Result.output, kernels.Result.data_grad, kernels.Result.filter_grad):
                assert kernels.plan_result(result, g, getattr(kernels.Dtype, dtype), True, device).blocks == 0
            assert kernels.plan_result(kernels.Result.both_grads, g, kernels.Dtype.bf16, True, device) is None


def test_no_shape_in_16_bits_nhwc_is_left_to_the_general_kernel(gpu: Gpu) -> None:
    for device in DEVICES:
        for shape in SHAPES:
            for result, plan in plans(gpu, shape, "bf16", True, device).items():
                assert plan.family.name != "general", f"{device}, {shape.id}, {result}"


def test_images_are_transposed_where_it_pays(gpu: Gpu) -> None:
    """NCHW images are transposed where only NHWC has a kernel, and where the planes' kernel is several times slower."""

    def transposes(
        channels: int,
        dtype: str,
        kernel: int = 3,
        dilation: int = 1,
        nhwc: bool = False,
        size: int = 20,
        stride: int = 1,
    ) -> list[bool]:
        sizes = {"in_h": size, "in_w": size, "out_h": size // stride, "out_w": size // stride}
        pairs = {"kernel": kernel, "stride": stride, "padding": dilation * (kernel // 2), "dilation": dilation}
        window = {f"{name}_{axis}": value for name, value in pairs.items() for axis in "hw"}
        g = gpu.kernels.Conv2d(batch=2, channels=channels, nhwc=nhwc, **sizes, **window)
        return [gpu.kernels.transposes(g, getattr(gpu.kernels.Dtype, dtype), of_filter) for of_filter in (False, True)]

    assert transposes(16, "bf16", dilation=2) == [True, True]
    assert transposes(16, "f32", dilation=2) == [True, True]
    assert transposes(16, "bf16") == [False, True]
    assert transposes(16, "bf16", 7) == [True, True]
    assert transposes(16, "f32", 7) == [False, True]
    assert transposes(16, "f32") == [False, True]
    assert transposes(16, "f32", size=40) == [False, False]
    assert transposes(16, "f32", 7, size=40) == [False, True]
    assert transposes(16, "f32", 7, size=4) == [True, True]
    assert transposes(16, "f32", stride=2) == [False, False]
    assert transposes(16, "bf16", 13) == [False, False]
    assert transposes(3, "bf16", dilation=2) == [False, False]
    assert transposes(32, "f32", 13) == [True, True]  # the general kernel either way, in NHWC with whole sectors
    assert transposes(16, "f32", 13) == [False, False]
    assert transposes(16, "bf16", dilation=2, nhwc=True) == [False, False]


def test_separable_layers_that_take_contiguous_images_where_they_lie(gpu: Gpu) -> None:
    """The choice for the benchmarks' shapes, with enough images to fill a GPU. It follows the H200's record of both
    ways."""

    def by_planes(dtype: str, backward: bool) -> set[str]:
        number = getattr(gpu.kernels.Dtype, dtype)
        square = [shape for shape in SHAPES if shape.kernel <= 7 and shape.kernel_width is None]
        return {s.id for s in square if gpu.kernels.takes_planes(geometry(gpu, s, False, batch=64), number, backward)}

    assert by_planes("bf16", False) == {"mnv2-112s2", "rkl-32-k3s2", "rkl-16-k3s2"}
    assert not by_planes("bf16", True)
    assert by_planes("f32", True) == {"mnv2-112s2", "rkl-32-k3s2", "rkl-16-k3s2"}
    small = {"mnv2-7", "mnv1-14", "mnas-14", "cnx-14", "rkl-8-k3s2", "rkl-4-k7", "rkl-4-k3", "rkl-4-k3s2"}
    dilated = {shape.id for shape in SHAPES if shape.dilation > 1}
    forward = by_planes("f32", False)
    assert not forward & (small | dilated)
    assert {"mnv1-112", "mnv2-112s2", "mnv2-56", "rkl-32-k3", "rkl-16-k7", "rkl-8-k3", "xcep-19"} <= forward
    # With one image, the launches of the transpositions would cost too much.
    assert all(
        gpu.kernels.takes_planes(geometry(gpu, s, False, batch=1), gpu.kernels.Dtype.f32, False)
        for s in SHAPES
        if s.id in small
    )


def test_what_is_left_to_pytorch(gpu: Gpu) -> None:
    """PyTorch gets shapes of up to 4 output columns at stride 2, in 16 bits and NHWC, without bias or activation."""

    def left(dtype: str, nhwc: bool, finished: bool = False) -> set[str]:
        number = getattr(gpu.kernels.Dtype, dtype)
        return {s.id for s in SHAPES if gpu.kernels.left_to_pytorch(geometry(gpu, s, nhwc), number, finished)}

    assert left("bf16", True) == {"rkl-8-k3s2", "rkl-4-k3s2"}
    assert left("f32", True) == left("bf16", False) == left("bf16", True, finished=True) == set()

    (shape,) = select("rkl-4-k3s2")
    dilated = geometry(gpu, replace(shape, dilation=2, padding=2), True)
    assert not gpu.kernels.left_to_pytorch(dilated, gpu.kernels.Dtype.bf16, False)  # not measured


def test_rows_are_cut_by_waves(gpu: Gpu) -> None:
    """Chunks of 28 rows are 1,792 blocks, 2.7 waves of 660, which take the time of 3 x 28 rows. All 112 rows at once
    would be 448 blocks and take 112, and chunks of 56 rows take 2 x 56."""
    (shape,) = select("mnv1-112")
    plan = plans(gpu, shape, "f32", True, "H200")["output"]
    assert (plan.family.name, plan.rows, plan.blocks) == ("registers", 28, 1792)


def test_rows_are_cut_by_what_a_multiprocessor_has_at_once(gpu: Gpu) -> None:
    """A block of 8 channels is one warp. Registers would let a multiprocessor run 16 of them."""
    (shape,) = select("mnv1-112")
    kernels, g = gpu.kernels, geometry(gpu, shape, True, channels=8)

    def parts(threads: int, blocks: int) -> int:
        device = kernels.Device(*DEVICES["A100"][:4], threads, blocks)
        return kernels.plan_result(kernels.Result.filter_grad, g, kernels.Dtype.bf16, True, device).parts

    assert parts(2048, 32) == parts(1536, 16) == parts(512, 32)
    assert parts(2048, 8) == parts(256, 32) < parts(2048, 32)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_sums_of_parts_are_few(gpu: Gpu, dtype: str) -> None:
    """The sums are written and read again. They are at most an eighth of what a filter's gradient reads, except for
    small images and the general kernel, whose parts have at least 8 outputs a tap."""
    for shape in SHAPES:
        plan = plans(gpu, shape, dtype, True, "H200")["filter_grad"]
        case = shape.case("depthwise", device="cuda")
        pixels = case.height * case.width * (1 + 1 / case.stride**2)
        read = case.batch * case.channels * pixels * (4 if dtype == "f32" else 2)
        sums = 8 * plan.parts * (case.kernel * case.filter_width + 1) * case.channels
        small = read < 64 << 20 or plan.family.name == "general"
        assert sums <= read / 8 or small, f"{shape.id}: {plan.parts} parts, {sums / read:.2f}"


def test_a_remembered_plan_is_the_one_that_would_be_made(gpu: Gpu) -> None:
    """A thread remembers its last plans by all that they are made from. Another thread makes its own."""

    def numbers() -> list[tuple[object, ...]]:
        fields = ("family", "kernel", "rows", "parts", "blocks", "threads", "shared")
        return [
            (shape.id, dtype, nhwc, device, name, *(getattr(plan, field) for field in fields))
            for shape in SHAPES
            for dtype in ("f32", "bf16", "f16")
            for nhwc in (True, False)
            for device in DEVICES
            for name, plan in plans(gpu, shape, dtype, nhwc, device).items()
        ]

    with ThreadPoolExecutor(1) as other:
        assert numbers() == numbers() == other.submit(numbers).result()
    h200, l4 = (plans(gpu, SHAPES[0], "bf16", True, device)["filter_grad"] for device in ("H200", "L4"))
    assert h200.parts != l4.parts, "the device's facts are part of what a plan is remembered by"


def test_plans_of_a_network_are_made_once(gpu: Gpu) -> None:
    """A training step of EfficientNet-B0 in NCHW asks for 92 plans. Of an endless stream of shapes not all are kept."""
    step = list(range(1, 93))
    assert gpu.kernels.plans_made(step * 3) == len(step)
    many = range(1000, 6000)
    assert gpu.kernels.plans_made(many) == len(many)
    assert gpu.kernels.plans_made(many) > len(many) // 2
    assert gpu.kernels.plans_made(step) == len(step)
    assert gpu.kernels.plans_made(step) == 0
