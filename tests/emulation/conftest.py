"""The emulated GPU as a fixture. ``--sanitized`` loads the build with AddressSanitizer (see test_sanitized.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from . import build

ORDERS = ("forward", "reverse", "shuffled")
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sanitized", action="store_true", help="run the emulated kernels under AddressSanitizer and UBSan"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sanitized: also run under AddressSanitizer and UBSan")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if reason := build.unavailable():  # another processor, no g++ or no CUDA headers
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("--sanitized", default=False):
        dropped = [item for item in here if not item.get_closest_marker("sanitized")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


class Gpu:
    """The emulated device: its kernels (attributes of ``kernels``), tensors in its memory, and its schedule."""

    def __init__(self, module: ModuleType, sanitized: bool) -> None:
        self.kernels = module
        self.sanitized = sanitized

    def schedule(self, order: str = "forward", seed: int = 1, late_copies: bool = True, removed: str = "") -> None:
        schedule = self.kernels.schedule
        schedule.order = getattr(self.kernels.Order, order)
        schedule.seed, schedule.late_copies = seed, late_copies
        schedule.first_blocks, schedule.last_blocks = -1, 0
        schedule.removed = removed

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, fill: bool = True, nhwc: bool = False) -> Tensor:
        """Memory of the device, filled with NaN, between gaps that no kernel may touch."""
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        memory = self.kernels.allocate(count * dtype.itemsize, fill)
        flat = torch.frombuffer(memory, dtype=dtype)
        if nhwc:
            n, c, h, w = shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(shape)

    def put(self, x: Tensor) -> Tensor:
        """A copy of a tensor in the device's memory: NHWC if the tensor is channels_last, else contiguous."""
        nhwc = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        return self.empty(*x.shape, dtype=x.dtype, nhwc=nhwc).copy_(x)

    def dtype(self, dtype: torch.dtype) -> object:
        return getattr(self.kernels.Dtype, DTYPES[dtype])

    def traffic(self) -> dict[str, object]:
        return self.kernels.traffic()

    def moved(self) -> int:
        """Bytes of the sectors that all kernels touched since the last reset."""
        return sum(t.read + t.written for t in self.kernels.traffic().values())


@pytest.fixture(scope="session")
def _emulated(request: pytest.FixtureRequest) -> tuple[ModuleType, bool]:
    sanitized = request.config.getoption("--sanitized", default=False)
    return build.load("sanitized" if sanitized else "checked"), sanitized


@pytest.fixture
def gpu(_emulated: tuple[ModuleType, bool]) -> Iterator[Gpu]:
    gpu = Gpu(*_emulated)
    gpu.schedule()
    gpu.kernels.reset()
    yield gpu
    gpu.kernels.reset()


@pytest.fixture
def operators(gpu: Gpu) -> Iterator[Any]:
    """The emulated kernels. They serve every call of the public functions except the reference's."""
    from .operators import Operators, serving  # here, because operators.py imports Gpu from this module

    operators = Operators(gpu)
    with serving(operators):
        yield operators
