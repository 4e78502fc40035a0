"""The host's time for a call, compared with PyTorch's own calls. Tensors are so small that nothing else counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import rkl_kernels as rk

from .machine import check_device, machine, machine_line
from .timing import Run, Timing, cpu_timer, interleave

SHAPE, OUTPUTS = (1, 8, 4, 4), 8
MODES = ("forward", "forward with gradient", "backward")

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
ROWS: dict[str, tuple[str, Function, Function]] = {
    "trelu": ("F.relu", lambda x, w, p: rk.trelu(x), lambda x, w, p: F.relu(x)),
    "depthwise": (
        "F.conv2d",
        lambda x, w, p: rk.depthwise_conv2d(x, w, None, 1, 1),
        lambda x, w, p: F.conv2d(x, w, None, 1, 1, 1, SHAPE[1]),
    ),
    "separable": (
        "two F.conv2d",
        lambda x, w, p: rk.separable_conv2d(x, w, p, None, None, 1, 1),
        lambda x, w, p: F.conv2d(F.conv2d(x, w, None, 1, 1, 1, SHAPE[1]), p),
    ),
}


def _run(function: Function, mode: str, device: str) -> Run:
    """One call of the function or of its backward. On a GPU the call queues its work without waiting for it."""
    channels = SHAPE[1]
    shapes = SHAPE, (channels, 1, 3, 3), (OUTPUTS, channels, 1, 1)
    x, w, p = (torch.randn(shape, device=device).requires_grad_(mode != MODES[0]) for shape in shapes)
    if mode != "backward":
        return lambda: function(x, w, p)
    y = function(x, w, p)
    grad = torch.randn_like(y)
    wanted = [
        t for t in (x, w, p) if torch.autograd.grad(y, t, grad, retain_graph=True, allow_unused=True)[0] is not None
    ]
    return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)


def measure(device: str = "cpu", seconds: float = 5.0) -> dict[tuple[str, str], tuple[Timing, Timing]]:
    """Our time and PyTorch's, by operator and mode, on one thread: sharing so little work costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = {}
        for name, (_, ours, theirs) in ROWS.items():
            for mode in MODES:
                runs = {"ours": _run(ours, mode, device), "theirs": _run(theirs, mode, device)}
                row = interleave(runs, cpu_timer, seconds / (len(ROWS) * len(MODES)))
                times[name, mode] = row["ours"], row["theirs"]
                if device == "cuda":
                    torch.cuda.synchronize()
        return times
    finally:
        torch.set_num_threads(threads)


def report(device: str = "cpu", seconds: float = 5.0) -> str:
    """The table of microseconds a call that `rkl bench host` prints."""
    check_device(device)
    shape = " x ".join(map(str, SHAPE))
    lines = [machine_line(machine(device)), f"microseconds a call, fp32, {shape}, k = 3, one thread; ours / PyTorch's"]
    for (name, mode), (ours, theirs) in measure(device, seconds).items():
        ratio = ours.seconds / theirs.seconds
        label = f"{name} against {ROWS[name][0]}"
        lines.append(f"{label:<32} {mode:<22} {ours.seconds * 1e6:6.1f} / {theirs.seconds * 1e6:6.1f}  {ratio:5.2f}x")
    return "\n".join(lines)
