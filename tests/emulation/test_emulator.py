"""The emulator catches the mistakes that it is there to catch, and lets correct kernels pass."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from . import build
from .conftest import ORDERS, Gpu
from .rewrite import rewrite

# Only __syncwarp orders the lanes of one warp. It is missing after a cp.async's wait; before a row is overwritten that
# another lane reads, or all; after a store, where one kernel has a shuffle in its place; after stmatrix and before
# ldmatrix.
LANE_BUGS = (
    "lane_copy",
    "lane_overwrite",
    "lane_broadcast",
    "lane_store",
    "lane_shuffle",
    "lane_stmatrix",
    "lane_ldmatrix",
)
# The message of each seeded bug must contain this. The order of threads decides which of two accesses comes last, and
# not whether there are two: the emulator notes who touched what between two barriers or __syncwarps. A launch, a
# barrier that not all threads reach and an access at a wrong address are the same in every order. So each order must
# show each bug.
CAUGHT = {
    "missing_barrier": "race in shared memory",
    "shared_overrun": "out of bounds: read of shared memory",
    "global_overrun": "out of bounds: write to global memory",
    "divergent_barrier": "divergent __syncthreads",
    "early_return": "never reach: they returned",
    "wait_count": "being written by a cp.async in flight",
    "missing_wait": "in flight",
    "block_race": "race between blocks",
    "lost_lane": "a warp's exchange waits for a lane that waits in __syncthreads",
    "misaligned_vector": "misaligned read of 16 bytes, global memory",
    "copy_in_flight": "ended with a cp.async in flight",
    "shared_limit": "more dynamic shared memory than",
    "static_shared_limit": "static and dynamic shared memory together are 53248 bytes",
    "row_barrier": "race in shared memory",
    "row_overrun": "out of bounds: read of shared memory",
    "misaligned_row": "misaligned write to 16 bytes, shared memory",
    "foreign_address": "out of bounds: an address past all shared memory",
    **dict.fromkeys(LANE_BUGS, "no __syncwarp between"),
    "lane_copy_over": "being written by a cp.async in flight",
    "half_warps": "__syncwarp of some of a warp's lanes",
    "warp_for_block": "no barrier between",
}
# What AddressSanitizer, UBSan or the emulator must say of some of these bugs in the sanitized build.
CAUGHT_SANITIZED = {
    "shared_overrun": "index 128 out of bounds",
    "global_overrun": "AddressSanitizer: use-after-poison",
    "misaligned_vector": "misaligned address",
    "divergent_barrier": "divergent __syncthreads",
    "row_overrun": "out of bounds: read of shared memory",
}


def launch(gpu: Gpu, bug: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel read and what it wrote."""
    x = gpu.put(torch.randn(256))
    y = gpu.empty(256)
    getattr(gpu.kernels.seeded_bugs, bug)(x.data_ptr(), y.data_ptr())
    return x, y


@pytest.mark.sanitized
@pytest.mark.parametrize("late_copies", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_correct_kernel_passes(gpu: Gpu, order: str, late_copies: bool) -> None:
    gpu.schedule(order, late_copies=late_copies)
    x, y = launch(gpu, "correct")
    rings = x.view(2, 128)
    assert torch.equal(y.view(2, 128), rings.roll(1, 1) + rings.roll(-1, 1))
    x, y = launch(gpu, "correct_rows")
    # Word c of row r of matrix i is register i of thread 4 r + c, and each warp has the other's rows.
    assert torch.equal(y.view(2, 4, 8, 4), x.view(2, 8, 4, 4).permute(0, 3, 1, 2).flip(0))
    x, y = launch(gpu, "correct_lanes")
    assert torch.equal(y.view(32, 2, 4), x.view(32, 2, 4).flip(1))


@pytest.mark.parametrize("late_copies", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bug", CAUGHT)
def test_seeded_bug_is_caught(gpu: Gpu, bug: str, order: str, late_copies: bool) -> None:
    gpu.schedule(order, late_copies=late_copies)
    with pytest.raises(RuntimeError, match=re.escape(CAUGHT[bug])):
        launch(gpu, bug)


def test_every_seeded_bug_is_expected(gpu: Gpu) -> None:
    names = {name for name in dir(gpu.kernels.seeded_bugs) if not name.startswith("_")}
    assert names == {"correct", "correct_rows", "correct_lanes", *CAUGHT}


@pytest.mark.parametrize("bug", CAUGHT_SANITIZED)
def test_sanitizers_catch_seeded_bug(bug: str) -> None:
    code = (
        "import sys; from tests.emulation.build import load; m = load('sanitized'); import ctypes\n"
        "x, y = (ctypes.addressof(ctypes.c_char.from_buffer(m.allocate(1024, True))) for _ in range(2))\n"
        f"m.seeded_bugs.{bug}(x, y)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=build.sanitizer_environment(), cwd=build.ROOT
    )
    assert done.returncode
    assert CAUGHT_SANITIZED[bug] in done.stderr


def test_traffic_is_counted_by_sector(gpu: Gpu) -> None:
    launch(gpu, "correct")
    traffic = gpu.traffic()["ring"]
    # Each block reads its 128 floats twice and writes them once. A sector counts once for each block and direction.
    assert (traffic.launches, traffic.blocks, traffic.read, traffic.written) == (1, 2, 1024, 1024)


def test_rewriter() -> None:
    assert "emulator::shared<Tile<float, 3>[2][N]>([] {})" in rewrite("__shared__ Tile<float, 3> t[2][N];", "a.cu")
    assert "auto& t" in rewrite("  __shared__ alignas(128) float t[4];", "a.cu")
    assert "char* s = static_cast<char*>(" in rewrite("extern __shared__ __align__(16) char s[];", "a.cu")
    launch = 'emulator::Launch("k", grid, 32, 0, stream)(k<T, 3>, a, b);'
    assert launch in rewrite("k<T, 3><<<grid, 32, 0, stream>>>(a, b);", "a.cu")
    assert 'emulator::Launch("ns::k", 1, 2)(ns::k)' in rewrite("ns::k<<<1, 2>>>()", "a.cu")
