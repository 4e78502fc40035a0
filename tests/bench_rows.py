"""A tiny case, rows with made-up times and a small network, for the tests of the benchmarks."""

from __future__ import annotations

import torch

from rkl_kernels.bench import Case
from rkl_kernels.bench.row import Row
from rkl_kernels.bench.timing import Timing

TINY = Case("depthwise", 2, 8, 9, 7, kernel=3, padding=1, name="tiny")


def row_of(case: Case = TINY, copy: float = 1.0, rate: float = 1e12, noise: float = 0.0, **times: float) -> Row:
    """A row with made-up seconds, given by keywords such as ``ours_nhwc``."""
    timings = {name.replace("_", " "): Timing(seconds, noise, 9) for name, seconds in times.items()}
    return Row(case, Timing(copy, noise, 9), rate, timings)


class Net(torch.nn.Sequential):
    def __init__(self) -> None:
        conv = torch.nn.Conv2d(3, 3, 3, padding=1, groups=3)
        super().__init__(conv, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 10))


class Spoilt(torch.nn.Module):
    """A network whose results are multiplied by a factor. The class counts the calls of all its instances."""

    calls = 0

    def __init__(self, net: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Spoilt.calls += 1
        return self.factor * self.net(x)
