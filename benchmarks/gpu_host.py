"""The host's time for a call, beside PyTorch's own operators: forward without and with a gradient wanted, and backward.
Tensors are so small that the GPU waits for the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import rkl_kernels as rk
from rkl_kernels.bench.timing import Run, Timing, interleave

PASSES = {"forward": 1.5, "forward with gradient": 1.5, "backward": 1.3}
"""Each pass and its bar: it may take at most so many times PyTorch's time."""


@dataclass(frozen=True)
class HostRow:
    """The host's seconds for a call of this package's operator ("ours") and of PyTorch's ("eager")."""

    operator: str
    step: str
    times: dict[str, Timing]

    @property
    def ratio(self) -> float:
        """Our time over PyTorch's."""
        return self.times["ours"].seconds / self.times["eager"].seconds


def operators(device: str) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], list[torch.Tensor]]]:
    """Our operator, the PyTorch calls that do the same, and the tensors for both."""
    kind: Any = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(1, 16, 8, 8, **kind).contiguous(memory_format=torch.channels_last)
    depthwise, pointwise = torch.randn(16, 1, 3, 3, **kind), torch.randn(32, 16, 1, 1, **kind)
    return {
        "trelu (torch.tanh)": (rk.trelu, torch.tanh, [x]),
        "depthwise_conv2d (F.conv2d)": (
            lambda x, w: rk.depthwise_conv2d(x, w, padding=1),
            lambda x, w: F.conv2d(x, w, padding=1, groups=16),
            [x, depthwise],
        ),
        "separable_conv2d (F.conv2d twice)": (
            lambda x, d, p: rk.separable_conv2d(x, d, p, padding=1),
            lambda x, d, p: F.conv2d(F.conv2d(x, d, padding=1, groups=16), p),
            [x, depthwise, pointwise],
        ),
    }


def step_of(operator: Callable[..., Any], tensors: list[torch.Tensor], step: str) -> Run:
    if step == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return operator(*tensors)

        return forward
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    if step == "forward with gradient":
        return lambda: operator(*leaves)
    y = operator(*leaves)
    grad = torch.ones_like(y)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def host_timer(run: Run, calls: int) -> float:
    """The seconds in which a call returns, on average. The device is idle at the start."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def measure_host(device: str, budget: float) -> list[HostRow]:
    """Every operator and pass, in about ``budget`` seconds."""
    chosen = [(name, step, *given) for name, given in operators(device).items() for step in PASSES]
    rows = []
    for name, step, ours, eager, tensors in chosen:
        runs = {"ours": step_of(ours, tensors, step), "eager": step_of(eager, tensors, step)}
        for run in runs.values():
            for _ in range(20):
                run()
        rows.append(HostRow(name, step, interleave(runs, host_timer, budget / len(chosen))))
    return rows
