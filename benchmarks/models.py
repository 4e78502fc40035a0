"""Whole models: an inference, a training step and its peak memory, with this package's operators and with PyTorch's.

ResNet-KL is built on the package. Its rival is the same model under ``use_backend("reference")``. The others are
published models of torchvision and timm with random weights. Ours train after :func:`rkl_kernels.convert`, and infer
with the copy that :func:`rkl_kernels.fuse_for_inference` makes at the start.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rkl_kernels as rk
from rkl_kernels.bench import timing
from rkl_kernels.bench.memory import allocated, peak_memory
from rkl_kernels.bench.rivals import FORMATS
from rkl_kernels.bench.timing import Timing, cpu_timer, interleave
from rkl_kernels.errors import told

TOLERANCE = 1e-3
"""The largest accepted difference between converted and unconverted logits, as a share of the largest logit: fp32
through up to 50 layers, each summed in another order. The same holds for the loss of a training step."""

GRADIENT_TOLERANCE = 0.1
"""The largest accepted difference between converted and unconverted gradients, as a share of a gradient's norm, where
PyTorch's own two layouts differ by little. A value within rounding of an activation's kink may get the derivative of
the other side, and that changes all gradients before it: the two layouts differ by 0.02 in mobilenetv1_100, and by 0.25
in convmixer_768_32 (2 images)."""
LAYOUTS = 2.0
"""Ours may differ from PyTorch by this many times what its own two layouts differ by, if that is more."""
TELLING = 0.8
"""The largest bound that tells anything: a gradient that is missing is off by 1."""


@dataclass(frozen=True)
class Model:
    """A model, its batch and its image size: a batch that two cores do in about a second, and the published size."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    size: int


def resnet_kl() -> nn.Module:
    from rkl.network.model import ResNetKL

    return ResNetKL(classes=10, depth=18, width=64)


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None)

    return build


def timm_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return build


MODELS = (
    Model("ResNet-KL", resnet_kl, 32, 32),
    Model("MobileNetV2", torchvision_model("mobilenet_v2"), 8, 224),
    Model("Xception", timm_model("legacy_xception"), 2, 299),
    Model("ConvNeXt-T", torchvision_model("convnext_tiny"), 4, 224),
)
DIRECTIONS = ("inference", "training step")
VARIANTS = tuple(f"{name} {layout}" for name in ("ours", "eager") for layout in FORMATS)


@dataclass
class ModelRow:
    """One model in one direction, "inference" or "training step".

    Attributes:
        times: seconds a call, by variant ("ours nhwc", "eager nchw").
        memory: bytes allocated at a training step's peak, minus those that stay allocated between steps, by variant.
        rejected: the variants that were not timed, and why.
        note: how the gradients of a training step were compared, if not by GRADIENT_TOLERANCE.
    """

    model: str
    direction: str
    batch: int
    size: int
    times: dict[str, Timing] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def best(self, name: str) -> str | None:
        """The better layout of "ours" or "eager"."""
        found = [variant for variant in self.times if variant.startswith(name)]
        return min(found, key=lambda variant: self.times[variant].seconds, default=None)

    def ratio(self) -> float | None:
        """How many times our better layout is faster than PyTorch's."""
        ours, eager = self.best("ours"), self.best("eager")
        return self.times[eager].seconds / self.times[ours].seconds if ours and eager else None

    def memory_ratio(self) -> float | None:
        """Our peak memory as a share of PyTorch's, each in its faster layout."""
        ours, eager = self.best("ours"), self.best("eager")
        if ours not in self.memory or not self.memory.get(eager or ""):
            return None  # not measured, or over before the first sample
        return self.memory[ours] / self.memory[eager]


class Timed:
    """A variant of a model, whose inference or training step is timed.

    Attributes:
        net: the model that is trained.
        served: what inference calls.
        backend: the context of a call.
    """

    net: nn.Module
    served: nn.Module
    images: Tensor
    optimizer: torch.optim.Optimizer
    backend: Callable[[], AbstractContextManager[None]]

    def call(self, direction: str) -> Callable[[], Any]:
        """The work of a direction, with the model in its mode. A call that is timed does not switch it: that takes time
        for each module, of which a fused copy has fewer."""
        if direction == "inference":
            self.served.eval()
            return self.inference
        self.net.train()
        return self.step

    def inference(self) -> Any:
        with torch.no_grad(), self.backend():
            return self.served(self.images)

    def loss(self) -> Tensor:
        """The cross-entropy of every head, summed."""
        raise NotImplementedError

    def step(self) -> None:
        """Forward, loss, backward, one step of SGD with momentum."""
        self._differentiate()
        self._update()

    def _differentiate(self) -> Tensor:
        with self.backend():
            loss = self.loss()
            loss.backward()
        return loss.detach()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def first_step(self) -> list[Tensor]:
        """A training step, of which the loss and the gradient by every parameter are returned. What a model draws at
        random is the same for every variant."""
        self.call("training step")
        torch.manual_seed(0)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        loss = self._differentiate()
        results = [loss, *(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)]
        self._update()
        return results


def differences(got: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    """How a first step differs from another one: its loss, and the gradient that differs most, each as a share.

    Each filter's gradient is compared by itself, however small it is. Those of all vectors are compared as one: a bias
    before a norm has a gradient of rounding errors alone.
    """

    def off(got: Tensor, want: Tensor) -> Tensor:
        difference = (got.double() - want.double()).norm()
        return difference / want.double().norm() if difference else difference  # not 0 / 0, which is NaN

    def parts(gradients: list[Tensor]) -> list[Tensor]:
        filters, vectors = ([g for g in gradients if (g.dim() > 1) == wide] for wide in (True, False))
        return [*filters, *([torch.cat(vectors)] if vectors else [])]

    # torch's maximum passes on a NaN of any gradient. Python's would lose one that follows a number.
    gradient = torch.stack([off(a, b) for a, b in zip(parts(got[1:]), parts(want[1:]), strict=True)]).max()
    return float(off(got[0], want[0])), float(gradient)


def wrong_step(got: list[Tensor], want: list[Tensor], of_loss: float, of_gradients: float) -> str:
    """How a first step differs from another one by more than these shares, or "" if it does not."""
    loss, gradient = differences(got, want)
    if loss <= of_loss and gradient <= of_gradients:
        return ""
    return f"wrong: loss off by {loss:.2g}, a gradient by {gradient:.2g} of its norm"


def wrong_logits(got: Tensor, want: Tensor) -> str:
    """How logits differ from others by more than TOLERANCE, or "" if they do not."""
    off = float((got - want).abs().max() / want.abs().max())
    return "" if off <= TOLERANCE else f"wrong: logits off by {off:.2g} of the largest"


def gradient_bound(layouts: float) -> tuple[float, str]:
    """The largest accepted difference of a gradient where PyTorch's own two layouts differ by ``layouts``, and a note
    if it is not GRADIENT_TOLERANCE. It is infinite where a comparison would tell nothing."""
    bound = max(GRADIENT_TOLERANCE, LAYOUTS * layouts)
    own = f"PyTorch's own two layouts differ by {layouts:.2g} of a gradient's norm"
    if bound > TELLING:
        return math.inf, f"gradients not compared, as {own}"
    return bound, f"gradients compared to {bound:.2g}, as {own}" if bound > GRADIENT_TOLERANCE else ""


class Prepared(Timed):
    """A model as one variant, on PyTorch's layers or ours, in one layout."""

    def __init__(self, model: Model, variant: str, start: nn.Module | None = None, device: str = "cpu") -> None:
        name, layout = variant.split()
        torch.manual_seed(0)
        self.net = (copy.deepcopy(start) if start else model.build()).to(device, memory_format=FORMATS[layout])
        if name == "ours":
            rk.convert(self.net)
        self.served = rk.fuse_for_inference(self.net) if name == "ours" else self.net
        self.backend: Callable[[], AbstractContextManager[None]] = (
            nullcontext if name == "ours" else lambda: rk.use_backend("reference")
        )
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(model.batch, 3, model.size, model.size, generator=generator)
        self.images = images.to(device, memory_format=FORMATS[layout])
        self.labels = torch.arange(model.batch, device=device) % 10
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-4, momentum=0.9)

    def loss(self) -> Tensor:
        outputs = self.net(self.images)
        heads = [outputs] if isinstance(outputs, Tensor) else outputs.logits
        return torch.stack([F.cross_entropy(head, self.labels) for head in heads]).sum()


def check(prepared: dict[str, Prepared], inference: ModelRow, training: ModelRow) -> None:
    """Reject in both rows what gives other logits than "eager nchw", and in the second what trains differently. The
    gradients of PyTorch's other layout are not judged: they say how closely ours can be compared."""
    for one in prepared.values():
        one.call("inference")
    want = prepared["eager nchw"].inference()
    for variant, one in prepared.items():
        if wrong := wrong_logits(one.inference(), want):
            for row in (inference, training):
                row.rejected[variant] = wrong
    step, bound = prepared["eager nchw"].first_step(), GRADIENT_TOLERANCE
    for variant in ("eager nhwc", "ours nchw", "ours nhwc"):
        if variant in training.rejected:
            continue
        got = prepared[variant].first_step()
        if variant == "eager nhwc":
            bound, training.note = gradient_bound(differences(got, step)[1])
        if wrong := wrong_step(got, step, TOLERANCE, math.inf if variant == "eager nhwc" else bound):
            training.rejected[variant] = wrong


def measure_model(model: Model, budget: float) -> list[ModelRow]:
    """Inference and training step of all variants whose logits, and loss and gradients, are those of "eager nchw"."""
    start = model.build()
    prepared = {variant: Prepared(model, variant, start) for variant in VARIANTS}
    rows = [ModelRow(model.name, name, model.batch, model.size) for name in DIRECTIONS]
    check(prepared, *rows)
    for row in rows:
        is_step = row.direction == "training step"
        runs = {variant: one.call(row.direction) for variant, one in prepared.items() if variant not in row.rejected}
        row.times = interleave(runs, cpu_timer, budget * (3 if is_step else 1))
        if is_step and allocated() is not None:
            row.memory = {variant: peak_memory(run) for variant, run in runs.items()}
        ratio = row.ratio()
        said = "no ratio" if ratio is None else f"{ratio:.2f}x PyTorch's better layout"
        without = f", without {', '.join(row.rejected)}" if row.rejected else ""
        print(f"{row.model:<12} {row.direction:<14} {said}{without}", flush=True)
    return rows


def measure_all(budget: float, within: float) -> list[ModelRow]:
    """Every model. One that fails, because it is not installed for example, leaves a row that says so.

    Args:
        budget: seconds of timing an inference. A training step gets three times that.
        within: seconds after which no further model is begun.
    """
    rows, start = [], time.perf_counter()
    for model in MODELS:
        try:
            if time.perf_counter() - start > within:
                raise TimeoutError("not reached in time")
            rows += measure_model(model, budget)
        except Exception as problem:  # a model that fails must not cost the others their rows
            why = {"all": f"fails: {told(problem)}"}
            rows.append(ModelRow(model.name, "training step", model.batch, model.size, rejected=why))
    return rows


def to_json(row: ModelRow) -> dict[str, Any]:
    return vars(row) | {"times": {variant: timing.to_json(one) for variant, one in row.times.items()}}


def from_json(data: dict[str, Any]) -> ModelRow:
    return ModelRow(**data | {"times": {variant: timing.from_json(one) for variant, one in data["times"].items()}})
