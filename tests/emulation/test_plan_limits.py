"""Plans of shapes whose sizes do not fit into 32 bits. Families that count in 32 bits decline. Nothing is launched."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from .build import ROOT
from .conftest import Gpu
from .test_cuda_plan import DEVICES

RESULTS = ("output", "data_grad", "filter_grad", "both_grads")


def geometry(
    gpu: Gpu,
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    nhwc: bool = True,
) -> Any:
    """The geometry of one image at stride 1."""
    out = (s + 2 * p - d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel, strict=True))
    pairs = {"in": size, "out": out, "kernel": kernel, "stride": (1, 1), "padding": padding, "dilation": dilation}
    named = {f"{name}_{axis}": n for name, pair in pairs.items() for axis, n in zip("hw", pair, strict=True)}
    return gpu.kernels.Conv2d(batch=1, channels=channels, nhwc=nhwc, **named)


def plans(gpu: Gpu, dtype: torch.dtype, g: Any) -> dict[str, Any]:
    kernels, device = gpu.kernels, gpu.kernels.Device(*DEVICES["H200"])
    made = {r: kernels.plan_result(getattr(kernels.Result, r), g, gpu.dtype(dtype), True, device) for r in RESULTS}
    return {result: plan for result, plan in made.items() if plan is not None}


def families(gpu: Gpu, dtype: torch.dtype, g: Any) -> dict[str, str]:
    return {result: plan.family.name for result, plan in plans(gpu, dtype, g).items()}


ALL_GENERAL = dict.fromkeys(RESULTS[:3], "general")


@pytest.mark.parametrize("width", [2**32 // 24 + 1, 2**32 // 40 + 1])
def test_rows_of_a_plane_that_shared_memory_does_not_hold(gpu: Gpu, width: int) -> None:
    """Six rows of inputs, or ten rows with four of the gradient, take 4 GiB and a few bytes."""
    g = geometry(gpu, 1, (6, width), (3, 3), (1, 1), nhwc=False)
    assert families(gpu, torch.float32, g) == ALL_GENERAL


def test_planes_of_two_to_the_31_pixels(gpu: Gpu) -> None:
    """A small image in wide padding fits into shared memory, but a thread counts the outputs of its plane."""
    g = geometry(gpu, 1, (100, 100), (3, 3), (50_000, 50_000), nhwc=False)
    assert families(gpu, torch.bfloat16, g) == ALL_GENERAL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dilations_far_beyond_the_image(gpu: Gpu, dtype: torch.dtype) -> None:
    """The halos of four images side by side are 2^32 pixels, and the columns of two taps lie 2^36 bytes apart or more.

    Families that count in 32 bits must decline.
    """
    g = geometry(gpu, 64, (1, 8), (3, 3), (1, 2**29), (1, 2**29))
    assert families(gpu, dtype, g) == ALL_GENERAL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_filters_of_two_to_the_31_taps(gpu: Gpu, dtype: torch.dtype) -> None:
    assert families(gpu, dtype, geometry(gpu, 2**26, (1, 1), (7, 7), (3, 3))) == ALL_GENERAL


def test_filters_whose_bands_shared_memory_does_not_hold(gpu: Gpu) -> None:
    """Planes and bands of eight channels take 4 GiB and a few bytes."""
    rows = 2**32 // (8 * 2 * (64 + 24)) + 1
    served = families(gpu, torch.bfloat16, geometry(gpu, 8, (rows, 9), (rows, 9), nhwc=False))
    assert served["output"] == "general"


def test_filters_that_shared_memory_does_not_hold(gpu: Gpu) -> None:
    """The general kernel would keep eight vectors of channels of all taps, 4 GiB."""
    plan = plans(gpu, torch.float32, geometry(gpu, 4, (4096, 8192), (4096, 8192)))["output"]
    assert (plan.family.name, plan.kernel, plan.shared) == ("general", 0, 0)


def test_rows_whose_neighbours_32_bits_do_not_count(gpu: Gpu) -> None:
    """The last group of a row of 2^31 - 2 outputs ends beyond 2^31 - 1. A group of single outputs does not."""
    plan = plans(gpu, torch.float32, geometry(gpu, 4, (1, 2**31 - 2), (1, 9), (0, 4)))["output"]
    assert (plan.family.name, plan.kernel) == ("general", 0)


def test_pointwise_filters_of_two_to_the_31_elements(gpu: Gpu) -> None:
    facts, bf16 = gpu.kernels.current_device(), gpu.dtype(torch.bfloat16)
    assert gpu.kernels.serves_pointwise(256, 2**23, 0, bf16, True, facts)
    assert not gpu.kernels.serves_pointwise(256, 2**23 + 8, 0, bf16, True, facts)


def test_every_launch_makes_its_grid_by_the_one_that_refuses() -> None:
    sources = [path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu*")]
    launches = [launch for text in sources for launch in re.findall(r"<<<(\w+)\(", text)]
    assert launches
    assert set(launches) == {"grid"}
    assert len(launches) == sum(text.count("<<<") for text in sources)


def test_a_grid_that_no_gpu_takes_is_refused_by_name(gpu: Gpu) -> None:
    """A block for each 2 x 16 taps and channel: more than 2^32 blocks, which would wrap to the number of channels."""
    gpu.kernels.schedule.first_blocks = 0
    g, f32 = geometry(gpu, 2**20, (2, 65552), (2, 65552), nhwc=False), gpu.dtype(torch.float32)
    plan = gpu.kernels.plan_depthwise_backward(g, 0, 0, 0, 16, 0, f32)
    with pytest.raises(RuntimeError, match=r"any_filter_grad: a grid must have .* blocks, got 4296015872 x 1; split"):
        gpu.kernels.depthwise_backward(plan, g, 0, 0, 0, 0, 16, 0, 0, f32, 0)
