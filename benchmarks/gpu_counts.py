"""The least times on an H200, by count, of the row pipeline's kernels and of those for wide filters in fp32:
``python -m benchmarks.gpu_counts``. Needs no GPU.

Four things can limit a kernel: the unavoidable bytes, at the rate of a copy; the instructions, of which a
multiprocessor issues four a clock; the tensor cores' products; and shared memory's 128 bytes a clock. A kernel takes at
least the longest of these times. The rates were measured on an H200. The instructions are those of the built kernels'
hot loops (benchmarks/results/static.json). The number of rows that warps make comes from the plan.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

import rkl_kernels as rk
from rkl_kernels.planner import HOPPER

from .shapes import SHAPES, Shape
from .static_report import RESULTS

CLOCK, COPY = 1.77e9, 4.2e12  # Hz under these loads; bytes a second, read plus written
K16, K8, ISSUE, SHARED = 0.67, 0.99, 4.0, 128.0  # products and instructions a clock and multiprocessor; bytes
KERNELS = (
    ("output", "rows::rows_convolution<bfloat16, {}, false>", 544 + 1024),
    ("image's gradient", "rows::rows_convolution<bfloat16, {}, false>", 544 + 1024),
    ("filter's gradient", "rows::rows_filter_grad<bfloat16, {}>", 544 + 512),
    ("both gradients", "rows::rows_both_grads<bfloat16, {}>", 544 + 512 + 1024),
)
"""By Result's number in csrc/cuda/plan.h: what is made, the kernel, and the bytes that a row of 32 pixels by 8 channels
moves through shared memory beside ldmatrix. They are inputs with a halo, columns without one, and outputs, which go in
and out."""
FP32, BF16 = 0, 1  # the numbers of Dtype
GENERAL, ROWS = 0, 1  # the numbers of Family
WIDE = (
    ("output", "general::any_vectors<float, false, true>"),
    ("image's gradient", "general::any_vectors<float, false, true>"),
    ("filter's gradient", "general::any_filter_grad<float, 16, true>"),
)
"""What is made and the kernel, by Result's number, for filters of more than 8 columns in fp32."""


def plan(shape: Shape, result: int, dtype: int) -> list[int]:
    """Family, kernel, rows, parts, blocks, threads, shared memory and steps. Empty where no kernel makes the result."""
    case = shape.case("depthwise", device="cuda")
    sizes = [case.batch, case.channels, case.height, case.width, case.out_height, case.out_width]
    kernel = (shape.kernel, shape.kernel_width or shape.kernel)
    pairs = (kernel, (shape.stride,) * 2, (shape.padding,) * 2, (shape.dilation,) * 2)
    geometry = [*sizes, *(n for pair in pairs for n in pair)]
    return torch.ops.rkl.cuda_depthwise_plan(geometry, True, dtype, result, HOPPER)


def moved(shape: Shape, result: int, dtype: int = BF16) -> int:
    """The unavoidable bytes."""
    case = shape.case("depthwise", device="cuda")
    pixels = case.height * case.width, case.out_height * case.out_width
    images = [case.batch * case.channels * n for n in pixels]
    return (4 if dtype == FP32 else 2) * (sum(images) + (images[0] if result == 3 else 0))


def microseconds(shape: Shape, result: int, loops: dict[str, dict[str, int]]) -> list[float] | None:
    """Times by memory, instructions, products and shared memory. None where another family serves,
    and for the image's gradient at stride 2."""
    numbers = plan(shape, result, BF16)
    if not numbers or numbers[0] != ROWS or (result == 1 and shape.stride == 2):
        return None
    _, name, shared = KERNELS[result]
    loop = loops[name.format(numbers[1])]
    clocks = (
        loop["instructions"] / ISSUE,
        loop["mma_k16"] / K16 + loop["mma_k8"] / K8,
        (512 * loop["ldmatrix"] + shared) / SHARED,
    )
    rows = numbers[7] / HOPPER[1] / CLOCK
    return [1e6 * moved(shape, result) / COPY, *(1e6 * clock * rows for clock in clocks)]


def wide_microseconds(shape: Shape, result: int, loops: dict[str, dict[str, int]]) -> list[float] | None:
    """Times by memory and instructions for a wide filter in fp32. None where another family serves,
    and for filters of up to 8.

    The counts include rows of padding, which the kernel leaves out, and the outputs and taps that fill up a thread's 32
    sums.
    """
    family, _, _, parts, blocks, threads, *_ = plan(shape, result, FP32)
    if shape.kernel <= 8 or family != GENERAL:
        return None
    case = shape.case("depthwise", device="cuda")
    # Of all threads: taps of each thread's outputs, or the gradient's pixels for 32 channels of each block of a part.
    pixels = case.batch * case.out_height * case.out_width
    steps = blocks // parts * 32 * pixels if result == 2 else blocks * threads * shape.kernel**2
    loop = loops[WIDE[result][1]]
    a_step = 32 * loop["instructions"] / loop["multiply_adds"]  # instructions for 32 multiply-adds of each thread
    instructions = a_step * steps / 32  # of warps
    return [
        1e6 * moved(shape, result, FP32) / COPY,
        1e6 * instructions / ISSUE / HOPPER[1] / CLOCK,
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_counts", description=__doc__)
    parser.parse_args(arguments)
    if not hasattr(torch.ops.rkl, "cuda_depthwise_plan"):
        parser.error(f"needs the CUDA kernels, got an rkl_kernels without: {rk.backends()['cuda'].reason}")
    report = json.loads((RESULTS / "static.json").read_text())
    loops: dict[str, dict[str, int]] = {}
    for row in report["loops"]:  # the loop with the most products comes first
        if row["arch"] == 90:
            loops.setdefault(row["kernel"], row)
    print("| us on an H200, by count | memory | instructions | products | shared memory | at least |")
    print("|---|---|---|---|---|---|")
    for result, (what, _, _) in enumerate(KERNELS):
        for shape in SHAPES:
            times = microseconds(shape, result, loops)
            if times:
                columns = " | ".join(f"{time:.0f}" for time in times)
                print(f"| {what} {shape.id} | {columns} | {max(times):.0f} |")
    print("\n| us on an H200, by count, fp32 | memory | instructions | at least |")
    print("|---|---|---|---|")
    for result, (what, _) in enumerate(WIDE):
        for shape in SHAPES:
            times = wide_microseconds(shape, result, loops)
            if times:
                print(f"| {what} {shape.id} | {times[0]:.0f} | {times[1]:.0f} | {max(times):.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
