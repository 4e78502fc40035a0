"""The built CUDA kernels against the committed static report: no spills, and no loss against the earlier build."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import pytest

from benchmarks import static_loops, static_report
from benchmarks.static_loops import Bound

# How many instructions a row of 256 outputs may take in the hot loop: as many as it takes today.
BOUNDS = [
    # The trial programs that ran on an H200 took 84 and 128 forward at 3 x 3 and 7 x 7, and 150 for the filter's
    # gradient at 7 x 7. It takes 1 to 6 more to detect rows of padding and leave them out (6 of 14 at 8 px and 7 x 7).
    Bound(r"rows::rows_convolution<\w+, 0, false>", products=12, instructions=78, blocks=3),
    Bound(r"rows::rows_convolution<\w+, 1, false>", products=12, instructions=88, blocks=2),
    Bound(r"rows::rows_convolution<\w+, 2, false>", products=12, instructions=122, blocks=3),
    Bound(r"rows::rows_convolution<\w+, 3, false>", products=30, instructions=98, blocks=2),
    Bound(r"rows::rows_convolution<\w+, 6, false>", products=56, instructions=128, blocks=3),
    Bound(r"rows::rows_convolution<\w+, 9, false>", products=24, instructions=89, blocks=2),
    Bound(r"rows::rows_filter_grad<\w+, 0>", products=14, instructions=81, blocks=2),
    Bound(r"rows::rows_filter_grad<\w+, 3>", products=32, instructions=115, blocks=3),
    Bound(r"rows::rows_filter_grad<\w+, 6>", products=58, instructions=149, blocks=2),
    Bound(r"rows::rows_both_grads<\w+, 0>", products=26, instructions=124, blocks=2),
    Bound(r"rows::rows_stride2_data_grad<\w+, 0>", products=12, instructions=134, blocks=2),
    Bound(r"rows::separable_rows<\w+, 0, false>", products=20, instructions=134, blocks=4),
    Bound(r"rows::separable_rows<\w+, 2, false>", products=20, instructions=123, blocks=2),
    Bound(r"rows::separable_rows<\w+, 4, false>", products=28, instructions=139),
    Bound(r"convolve_toeplitz<\w+, 3, \w+>", products=16, instructions=117),
    Bound(r"convolve_toeplitz<\w+, 5, \w+>", products=24, instructions=166),
    Bound(r"filter_grad_toeplitz<\w+, 1, 1, \w+>", products=8, instructions=145),
    Bound(r"filter_grad_toeplitz<\w+, 2, 2, \w+>", products=32, instructions=278),
    # A tap of 8 outputs by 4 channels, of 4 by 8, and a step of 2 x 16 and of 4 x 8 taps.
    Bound(r"general::any_vectors<float, false, true>", products=32, instructions=49, blocks=2),
    Bound(r"general::any_vectors<(bfloat16|half), false, true>", products=32, instructions=67, blocks=2),
    Bound(r"general::any_filter_grad<\w+, 16, true>", products=32, instructions=63, blocks=2),
    Bound(r"general::any_filter_grad<\w+, 8, true>", products=32, instructions=76, blocks=2),
]
GOOD: dict[str, Any] = {
    "kernel": "k", "arch": 80, "threads": 128, "registers": 96, "spills": 0, "shared": 0, "blocks": 5,
    "loads_128": 4, "loads": 4, "stores_128": 2, "hmma": 8, "instructions": 100,
}  # fmt: skip


def test_built_kernels() -> None:
    if not static_report.LIBRARY.exists():
        pytest.skip("the CUDA extension is not built")
    if not static_report.tool("cuobjdump"):
        pytest.skip("triton, which ships cuobjdump, is not installed")
    committed = json.loads((static_report.RESULTS / "static.json").read_text())
    bodies = static_report.built_kernels()
    loops = static_report.nvcc_loops(bodies)
    rows = static_report.nvcc_rows(bodies, loops)
    assert {row["arch"] for row in rows} == {80, 90}
    assert any(row["kernel"].startswith("elementwise<") for row in rows)
    on_tensor_cores = [row for row in rows if "toeplitz" in row["kernel"] or row["kernel"].startswith("rows::")]
    assert on_tensor_cores
    assert all(row["hmma"] for row in on_tensor_cores)
    assert static_report.regressions(rows, committed["nvcc"]) == []
    assert static_loops.beyond(BOUNDS, rows, [*chain.from_iterable(loops.values())]) == []


def test_the_committed_page_shows_the_committed_figures() -> None:
    committed = json.loads((static_report.RESULTS / "static.json").read_text())
    assert (static_report.RESULTS / "static.md").read_text() == static_report.markdown(committed)


def test_the_page_says_which_loops_it_lists() -> None:
    """Kernels with matrix products have all loops of products, others one loop of multiply-adds."""
    committed = json.loads((static_report.RESULTS / "static.json").read_text())
    of_kernels: dict[tuple[str, int], list[int]] = {}
    for loop in committed["loops"]:
        assert static_loops.multiplications(loop)
        of_kernels.setdefault((loop["kernel"], loop["arch"]), []).append(static_loops.products_of(loop))
    for row in committed["nvcc"]:
        products = of_kernels.get((row["kernel"], row["arch"]), [])
        if row["hmma"]:
            assert products == sorted(products, reverse=True)
            assert all(products)
        else:
            assert products in ([], [0])
    assert "Of another kernel, the innermost loop with the most multiply-adds." in static_report.markdown(committed)


TRITON_CALLS = ("trelu bf16", "depthwise 64ch 3x3 bf16", "depthwise 64ch 3x3 s2 fp16")
"""A part of what ``make static`` compiles, to save time. It covers every kernel."""


def test_triton_kernels_ahead_of_time() -> None:
    static_triton = pytest.importorskip(
        "benchmarks.static_triton", reason="triton is not installed", exc_type=ImportError
    )
    committed = json.loads((static_report.RESULTS / "static.json").read_text())["triton"]
    rows = static_triton.triton_rows(TRITON_CALLS)
    assert {row["kernel"] for row in rows} <= {row["kernel"] for row in committed}
    assert static_report.regressions(rows, committed) == []


def test_committed_triton_kernels_load_vectors() -> None:
    rows = json.loads((static_report.RESULTS / "static.json").read_text())["triton"]
    assert static_report.regressions(rows, rows) == []  # no spill, and a block fits into shared memory
    for row in rows:
        title = row["kernel"]
        if title.startswith("gather_kernel") and "NCHW" not in title:
            assert row["loads_128"] == row["loads"], title


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 3}, "3 accesses of local memory"),
        ({"blocks": 4}, "4 blocks fit, were 5"),
        ({"loads_128": 0}, "no 128-bit loads any more"),
        ({"hmma": 0}, "no HMMA any more"),
    ],
)
def test_regression_is_named(change: dict[str, int], message: str) -> None:
    (found,) = static_report.regressions([GOOD | change], [GOOD])
    assert message in found
    assert "k on sm_80" in found


def test_no_regression() -> None:
    assert static_report.regressions([GOOD, GOOD | {"kernel": "new"}], [GOOD]) == []


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"),
    [(32, 0, 16), (96, 0, 5), (128, 0, 4), (255, 0, 2), (32, 40 << 10, 4), (32, 41 << 10, 3), (32, 1 << 20, 0)],
)
def test_blocks_of_128_threads_on_sm_80(registers: int, shared: int, blocks: int) -> None:
    # 65536 registers are 16 blocks of 128 threads with 32 registers each. With the reserved KiB, 40 KiB of shared
    # memory fit 4 times into 164, and 41 KiB 3 times.
    assert static_report.blocks_per_multiprocessor(80, 128, registers, shared) == blocks
