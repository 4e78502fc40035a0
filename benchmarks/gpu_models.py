"""Whole models on a GPU in bf16 and channels_last: inference, a training step and its peak memory.

Each model runs with this package's operators (converted, and fused for inference), with PyTorch's (eager), and with
PyTorch's through torch.compile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rkl_kernels as rk
from rkl_kernels.bench.timing import Timing, interleave, timer_for
from rkl_kernels.errors import told

from .models import DIRECTIONS, Model, ModelRow, Timed, resnet_kl, timm_model, wrong_step

TOLERANCE = 0.1
"""The largest accepted difference between converted and unconverted logits, as a share of the largest logit: bf16
through up to 50 layers. The same holds for the loss of a training step. The tests check each layer. This check finds a
model that is wired wrongly."""
GRADIENT_TOLERANCE = 0.8
"""The largest accepted difference between converted and unconverted gradients, as a share of a gradient's norm. In bf16
many values are within rounding of an activation's kink (MobileNetV2 0.47, with 16 images of 96 px, on a CPU). A
gradient that is missing is off by 1."""
VARIANTS = ("ours", "eager")
COMPILE = "compile"
"""torch.compile in its default mode. Rows of operators have it in max-autotune-no-cudagraphs (gpu_rows.py): to tune
each convolution of a model takes longer than a run may."""

# Batches fill a GPU, and their activations fit into 70 GB.
MODELS = (
    Model("ResNet-KL", resnet_kl, 1024, 32),
    Model("MobileNetV2", timm_model("mobilenetv2_100"), 256, 224),
    Model("Xception", timm_model("legacy_xception"), 128, 299),
    Model("ConvNeXt-T", timm_model("convnext_tiny"), 128, 224),
    Model("EfficientNet-B0", timm_model("efficientnet_b0"), 256, 224),
)


@dataclass(frozen=True)
class ModelBar:
    """What a model's row should reach: times faster than PyTorch, and at most this share of its peak memory."""

    faster: float
    memory: float | None = None


def bar_of(row: ModelRow) -> ModelBar:
    if row.direction == "inference":
        return ModelBar(1.15)
    return ModelBar(1.5, 0.7) if row.model == "ResNet-KL" else ModelBar(1.2)


class Prepared(Timed):
    """A model as one variant, in bf16 and channels_last."""

    def __init__(self, start: nn.Module, variant: str, batch: int, size: int, device: str) -> None:
        kind: Any = {"device": device, "dtype": torch.bfloat16, "memory_format": torch.channels_last}
        net = copy.deepcopy(start).to(**kind)
        if variant == "ours":
            rk.convert(net)
        # ResNet-KL is built on the package. Its rival is the same model on PyTorch's operators.
        self.backend: Callable[[], AbstractContextManager[None]] = (
            nullcontext if variant == "ours" else lambda: rk.use_backend("reference")
        )
        self.net = torch.compile(net) if variant == COMPILE else net
        self.served = rk.fuse_for_inference(net) if variant == "ours" else self.net
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
        self.images = images.to(**kind)
        self.labels = torch.arange(batch, device=device) % 10

    def loss(self) -> Tensor:
        return torch.stack([F.cross_entropy(head.float(), self.labels) for head in _heads(self.net(self.images))]).sum()


def _heads(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs.logits)


def measure_model(number: int, device: str, compile_too: bool, budget: float) -> list[ModelRow]:
    """Both directions of ``MODELS[number]``. Each variant's logits, loss and gradients are checked against eager's
    before it is timed. On a CPU, where the program is only tried, two small images are used."""
    model = MODELS[number]
    batch, size = (model.batch, model.size) if device == "cuda" else (2, min(model.size, 64))
    torch.manual_seed(0)
    start = model.build()
    rows = [ModelRow(model.name, direction, batch, size) for direction in DIRECTIONS]
    prepared: dict[str, Prepared] = {}
    want: list[Tensor] = []
    want_step: list[Tensor] = []
    for variant in ("eager", "ours", *([COMPILE] if compile_too else [])):
        try:
            one = Prepared(start, variant, batch, size, device)
            got = [head.float() for head in _heads(one.call("inference")())]
            want = want or got
            # torch's maximum passes on a NaN of any head. Python's would lose one that follows a number.
            off = float(
                torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(got, want, strict=True)]).max()
            )
            if not off <= TOLERANCE:
                raise ValueError(f"logits off by {off:.2g} of the largest")
            step = one.first_step()
            want_step = want_step or step
            if wrong := wrong_step(step, want_step, TOLERANCE, GRADIENT_TOLERANCE):
                rows[1].rejected[variant] = wrong
            prepared[variant] = one
        except Exception as problem:  # a variant that fails must not cost the others their figures
            for row in rows:
                row.rejected[variant] = f"fails: {told(problem)}"
    for row in rows:
        runs = {variant: one.call(row.direction) for variant, one in prepared.items() if variant not in row.rejected}
        row.times = interleave(runs, timer_for(device), budget)
        if row.direction == "training step" and device == "cuda":
            row.memory = {variant: peak(run) for variant, run in runs.items()}
    return rows


def peak(step: Callable[[], object]) -> int:
    """Bytes allocated at the step's peak, minus those that stay allocated between steps."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ratio(row: ModelRow, rival: str) -> float | None:
    """How many times ours is faster than the rival, "eager" or "compile"."""
    times: dict[str, Timing] = row.times
    return times[rival].seconds / times["ours"].seconds if {"ours", rival} <= times.keys() else None


def memory_ratio(row: ModelRow, rival: str) -> float | None:
    """Our peak memory as a share of the rival's."""
    return row.memory["ours"] / row.memory[rival] if {"ours", rival} <= row.memory.keys() else None
