"""Launches of more blocks than a GPU takes. Nothing is run."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from .build import ROOT
from .conftest import Gpu


def geometry(
    gpu: Gpu,
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    nhwc: bool = True,
) -> Any:
    """One image, at stride 1."""
    out = (s + 2 * p - d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel, strict=True))
    pairs = {"in": size, "out": out, "kernel": kernel, "stride": (1, 1), "padding": padding, "dilation": dilation}
    named = {f"{name}_{axis}": n for name, pair in pairs.items() for axis, n in zip("hw", pair, strict=True)}
    return gpu.kernels.Conv2d(batch=1, channels=channels, nhwc=nhwc, **named)


def test_every_launch_makes_its_grid_by_the_one_that_refuses() -> None:
    sources = [path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu*")]
    launches = [launch for text in sources for launch in re.findall(r"<<<(\w+)\(", text)]
    assert launches
    assert set(launches) == {"grid"}
    assert len(launches) == sum(text.count("<<<") for text in sources)


def test_a_grid_that_no_gpu_takes_is_refused_by_name(gpu: Gpu) -> None:
    """A block for each tap and channel: 2^32 and some, which would wrap to as many as there are channels."""
    gpu.kernels.schedule.first_blocks = 0
    g, f32 = geometry(gpu, 2**20, (64, 64), (64, 64), nhwc=False), gpu.dtype(torch.float32)
    plan = gpu.kernels.plan_depthwise_backward(g, 0, 0, 0, 0, 16, 0, f32)
    with pytest.raises(RuntimeError, match=r"any_filter_grad: a grid must have .* blocks, got 4296015872 x 1; split"):
        gpu.kernels.depthwise_backward(plan, g, 0, 0, 0, 0, 16, 0, 0, f32, 0)
