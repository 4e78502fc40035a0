"""Every barrier of the CUDA kernels is needed: where the emulator passes over one, a case has a race."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from . import build
from .conftest import Gpu
from .depthwise_cases import Case, Run
from .test_epilogue import column_sums
from .test_pointwise import multiply
from .test_separable import Case as Separable
from .test_separable import Run as SeparableRun

Launch = Callable[[Gpu], object]
BF16, F32 = torch.bfloat16, torch.float32


def barriers(text: str) -> list[int]:
    """The lines of a source that call __syncthreads or __syncwarp."""
    lines = enumerate(text.splitlines(), 1)
    return [number for number, line in lines if re.search(r"\b__sync(threads|warp)\(", line.partition("//")[0])]


SOURCES = {path.name: barriers(path.read_text()) for path in sorted((build.ROOT / "csrc/cuda").glob("*.*"))}
BARRIERS = [f"{name}:{line}" for name, lines in SOURCES.items() for line in lines]


def depthwise(method: str, dtype: torch.dtype, **sizes: object) -> Launch:
    return lambda gpu: getattr(Run(gpu, Case(**sizes), dtype), method)()  # type: ignore[arg-type]


def transpose(to_nhwc: bool) -> Launch:
    def launch(gpu: Gpu) -> None:
        x, y = gpu.put(torch.randn(2 * 64 * 64)), gpu.empty(2 * 64 * 64)
        gpu.kernels.transpose(x.data_ptr(), y.data_ptr(), to_nhwc, 2, 64, 64, gpu.dtype(F32), 0)

    return launch


# Wide filters in NHWC and NCHW, with more tiles than a block makes at once.
WIDE = [
    {"channels": channels, "kernel": (3, 9), "padding": (1, 4), "size": (17, 8), "batch": 34, "nhwc": nhwc}
    for channels, nhwc in ((8, True), (1, False))
]
ONE_TASK = {"channels": 8, "size": (8, 8), "batch": 1}
SEVERAL_TASKS = {"channels": 64, "size": (2, 8), "batch": 160}
# What reaches all barriers of a file.
LAUNCHES: dict[str, list[Launch]] = {
    "add_parts.cuh": [depthwise("weight_grad", F32, channels=4)],
    "epilogue.cu": [lambda gpu: column_sums(gpu, gpu.put(torch.randn(40, 8)))],
    # Filter rows in two steps.
    "general.cu": [depthwise("forward", F32, channels=4, kernel=(35, 16), padding=(17, 3), size=(4, 20), batch=1)],
    "general_filter_grad.cu": [depthwise("weight_grad", F32, channels=3)],
    "planes.cu": [depthwise("forward", F32, channels=3, nhwc=False)],
    "planes_filter_grad.cu": [depthwise("weight_grad", F32, channels=32, size=(16, 16), batch=8, nhwc=False)],
    "pointwise.cu": [lambda gpu: multiply(gpu, (70, 40, 24), BF16, None)],
    "registers.cuh": [depthwise("forward", F32, channels=2, kernel=(5, 5), padding=(2, 2))],
    "registers_filter_grad.cu": [depthwise("weight_grad", F32, channels=4)],
    # Maps with rows of padding below them. Several tasks of a block, which no barrier separates.
    "rows_convolution.cu": [depthwise("forward", BF16, **sizes) for sizes in (ONE_TASK, SEVERAL_TASKS)],
    "rows_filter_grad.cu": [
        depthwise(method, BF16, **sizes)
        for method in ("weight_grad", "both_grads")
        for sizes in (ONE_TASK, SEVERAL_TASKS)
    ],
    "rows_stride2.cu": [depthwise("input_grad", BF16, **sizes, stride=(2, 2)) for sizes in (ONE_TASK, SEVERAL_TASKS)],
    "separable_rows.cu": [
        lambda gpu: SeparableRun(gpu, Separable(channels=8, outputs=8, size=(8, 8), batch=1)).forward(),
        lambda gpu: SeparableRun(gpu, Separable(channels=64, outputs=8, size=(2, 8), batch=160)).forward(),
    ],
    "toeplitz.cu": [depthwise("forward", BF16, **sizes) for sizes in WIDE],
    "toeplitz_filter_grad.cu": [depthwise("weight_grad", BF16, **sizes) for sizes in WIDE],
    "transpose.cu": [transpose(True), transpose(False)],
}


def launch_all(gpu: Gpu, name: str) -> None:
    for launch in LAUNCHES[name]:
        launch(gpu)


def test_every_file_with_barriers_has_launches() -> None:
    assert set(LAUNCHES) == {name for name, lines in SOURCES.items() if lines}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_have_no_race(gpu: Gpu, name: str) -> None:
    launch_all(gpu, name)


@pytest.mark.parametrize("barrier", BARRIERS)
def test_without_a_barrier_there_is_a_race(gpu: Gpu, barrier: str) -> None:
    gpu.schedule(removed=barrier)
    with pytest.raises(RuntimeError, match="race in shared memory"):
        launch_all(gpu, barrier.partition(":")[0])
