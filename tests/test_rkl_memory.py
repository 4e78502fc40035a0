"""The trainer's settings of the allocator, by the page faults that a process then has."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from rkl.config import from_plain
from rkl.training import train as trainer
from rkl_kernels import allocator

FAULTS = """
import ctypes, resource, sys
import torch

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would hide 511 faults of 512

if sys.argv[1] == "trained":
    from rkl.config import Config
    from rkl.training import train as trainer

    # ends at the data, which it has none of: after the trainer has settled its process
    try:
        trainer.train(Config(data="cifar10", data_root=sys.argv[2], out=sys.argv[2] + "/run"))
        sys.exit("the run should have ended for want of data")
    except ValueError as error:
        assert "no data_batch_1" in str(error), error

def step():
    return [torch.ones(16 << 20) for _ in range(2)]  # 64 MiB each

for _ in range(4):  # until the heap holds what a step takes
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() >> 20)
"""

GAPS = """
import resource
from pathlib import Path
import torch
from rkl_kernels.allocator import keep_freed_memory, return_gaps

def resident():  # MiB
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

keep_freed_memory()
before = resident()
tensors = [torch.ones(size) for _ in range(200) for size in (1 << 18, 16)]  # 1 MiB, then one that stays
del tensors[::2]
full = resident()
return_gaps()
print(full - before, resident() - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")


def run(program: str, *arguments: str) -> list[int]:
    ran = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return [int(number) for number in ran.stdout.split()]


def touched(state: str, folder: Path) -> int:
    """MiB of pages that 8 steps of 128 MiB touched for the first time."""
    return run(FAULTS, state, str(folder))[0]


@glibc
def test_gaps_between_tensors_go_back() -> None:
    full, after = run(GAPS)
    assert full > 190
    assert after < 50


@glibc
def test_a_training_process_keeps_what_a_step_freed(tmp_path: Path) -> None:
    fresh = touched("fresh", tmp_path)
    assert fresh >= 512  # or this test shows nothing
    assert touched("trained", tmp_path) < fresh / 4  # 0 in most runs, but the heap may grow once more


def test_another_allocator_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "glibc_function", lambda name: None)
    assert not allocator.keep_freed_memory()
    assert not allocator.return_gaps()


@pytest.mark.usefixtures("no_plots")
def test_gaps_go_back_every_so_many_steps_of_all_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []
    monkeypatch.setattr(trainer, "return_gaps", lambda: returned.append(True))
    monkeypatch.setattr(trainer, "GAP_STEPS", 4)
    settings = {"width": 4, "image_size": 8, "train_size": 40, "test_size": 40, "batch_size": 32, "epochs": 9}
    trainer.train(from_plain(settings | {"out": str(tmp_path / "run")}))  # one step an epoch
    assert len(returned) == 9 // 4
