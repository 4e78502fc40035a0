"""All that training changes: the model, its moving average (if one is kept), the optimiser and the gradient scaler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rkl_kernels as rk

from ..config import Config, Decay
from ..data import Dataset
from ..distill import add_l1_gradient
from ..network.blocks import MultiScaleDepthwise
from ..network.build import build_model
from ..slimming import pruning
from ..slimming.channels import channel_plan
from . import checkpoint
from .evaluation import default_device, precision_on
from .files import understood


def make_fabric(config: Config) -> Fabric:
    """Lightning Fabric for a run. It uses the GPU if there is one, and DistributedDataParallel for several devices.

    Each process keeps its own batch norm statistics until the epoch ends (:meth:`Learner.agree`).

    Raises:
        ValueError: a precision that the device does not have, or more GPUs than there are.
    """
    strategy = DDPStrategy(broadcast_buffers=False) if config.devices > 1 else "auto"
    device = default_device()
    precision = precision_on(config, device)
    if precision == "16-mixed" and device.type == "cpu":  # Fabric would train in bfloat16
        raise ValueError("precision must be 32-true or bf16-mixed on a CPU, got '16-mixed'")
    if device.type == "cuda" and config.devices > torch.cuda.device_count():
        raise ValueError(f"devices must be at most the {torch.cuda.device_count()} GPUs, got {config.devices}")
    return Fabric(accelerator=device.type, devices=config.devices, precision=precision, strategy=strategy)


def parameter_groups(model: nn.Module, weight_decay: float, decay: Decay = "filters") -> list[dict[str, Any]]:
    """Two groups: dense and pointwise filters, which decay, and norms, biases and depthwise filters, which do not decay
    unless ``decay`` is "all".

    Decay would shrink all gammas alike, where the L1 term is to spread them, so that the cuts can rank the channels.
    """
    spared: set[Tensor] = set()
    for module in model.modules():
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        if depthwise or isinstance(module, (rk.DepthwiseConv2d, MultiScaleDepthwise)):  # even if cut to one channel
            spared.update(module.parameters())
    spared.update(parameter for parameter in model.parameters() if parameter.ndim == 1)
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p not in spared], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p in spared], "weight_decay": weight_decay if decay == "all" else 0.0},
    ]


def new_model(config: Config, data: Dataset, restored: bool = False) -> nn.Module:
    """The network that a run begins with: its values are random, or those of the run that ``weights`` names.
    ``restored``: a checkpoint will replace the values, so no other run is read."""
    model = build_model(config, data.num_classes, data.channels, data.image_size)
    if restored or config.weights is None:
        return model
    return checkpoint.start_from(model, config.weights, config.width, data.channels, data.classes)


class Learner:
    """Model, average and optimiser of one run on one device.

    Args:
        start: a model of this configuration to train further.
        resumed: whether :meth:`restore` follows, so that no weights of another run are loaded.
    """

    def __init__(
        self, config: Config, data: Dataset, fabric: Fabric, start: nn.Module | None = None, resumed: bool = False
    ) -> None:
        self.config, self.fabric = config, fabric
        torch.manual_seed(config.seed)
        model = new_model(config, data, resumed) if start is None else start
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        # torch's stubs lack this overload.
        self.model = model.to(fabric.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        follow = get_ema_multi_avg_fn(config.ema)
        self.average = AveragedModel(self.model, multi_avg_fn=follow, use_buffers=True) if config.ema else None
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, config.weight_decay, config.decay),
            config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
        )

    def wrap(self) -> None:
        """Hand model and optimiser to Fabric, at the start and again after each cut."""
        model = self.model
        if self.config.compile:
            # CUDA graphs keep a step's gradients in one place, so they cannot add up those of several batches.
            graphs = self.fabric.device.type == "cuda" and self.config.accumulate == 1
            model = torch.compile(model, mode="reduce-overhead" if graphs else "default")
        self.wrapped, self.stepper = self.fabric.setup(model, self.optimizer)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated: the moving average if one is kept."""
        return self.average.module if self.average else self.model

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler of "16-mixed"."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    def step(self, rate: float, l1: float) -> None:
        """One step along the gradients of backward, which are then cleared. ``rate``: learning rate; ``l1``: lambda."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if l1:
            one = torch.ones((), device=self.fabric.device)
            add_l1_gradient(self.model, l1, self.scaler.scale(one) if self.scaler else 1.0)
        if self.config.clip:
            self.fabric.clip_gradients(self.wrapped, self.stepper, max_norm=self.config.clip, error_if_nonfinite=False)
        self.stepper.step()
        self.stepper.zero_grad()
        if self.average:
            self.average.update_parameters(self.model)

    def agree(self) -> None:
        """Give every process the mean of all processes' batch norm statistics."""
        if self.fabric.world_size == 1:
            return
        for model in (self.model, self.average.module) if self.average else (self.model,):
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    mean = self.fabric.all_reduce(buffer, reduce_op="mean")
                    assert isinstance(mean, Tensor)
                    buffer.copy_(mean)

    def prune(self, example: Tensor, ratio: float) -> None:
        """Cut the model, its average and its optimiser. All processes have equal models, so their cuts are equal."""
        followers = [self.average.module] if self.average else []
        pruning.prune(self.model, example, ratio, self.optimizer, followers, self.config.importance)
        self.optimizer.zero_grad()  # the gradients that ranked the channels belong to no step

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a run needs to go on, by name."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum.{name}"] = buffer
        if self.average:
            tensors |= {f"ema.{name}": value for name, value in self.average.module.state_dict().items()}
            tensors["averaged"] = self.average.n_averaged
        return tensors

    def facts(self) -> dict[str, Any]:
        """All else that a run needs to go on, for JSON: the plan of channels and the scaler's state."""
        return {
            "plan": channel_plan(self.model),
            "scaler": self.fabric.strategy.precision.state_dict(),
        }

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load the last checkpoint's tensors, as saved by :meth:`tensors`, and return the checkpoint's facts."""
        tensors, facts = checkpoint.load(folder, "last")
        source = folder / "last.json"
        checkpoint.check_settings(self.config, facts, source)
        with understood(source, "a whole run's checkpoint"):
            self._restore(tensors, facts, source)
        return checkpoint.with_newer_best(folder, facts) if self.config.test_with == "best" else facts

    def _restore(self, tensors: dict[str, Tensor], facts: dict[str, Any], source: Path) -> None:
        checkpoint.restore_model(self.model, checkpoint.part(tensors, "model."), facts["plan"], source)
        # The plan replaced parameters by narrower ones. The optimiser, which has no state yet, gets those.
        fresh = parameter_groups(self.model, self.config.weight_decay, self.config.decay)
        for group, own in zip(self.optimizer.param_groups, fresh, strict=True):
            group["params"] = own["params"]
        for name, parameter in self.model.named_parameters():
            if f"momentum.{name}" in tensors:
                momentum = tensors[f"momentum.{name}"]
                if momentum.shape != parameter.shape:
                    raise ValueError(f"momentum.{name} is {tuple(momentum.shape)}")
                buffer = torch.empty_like(parameter, requires_grad=False).copy_(momentum)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        if self.average:
            checkpoint.restore_model(self.average.module, checkpoint.part(tensors, "ema."), facts["plan"], source)
            self.average.n_averaged.copy_(tensors["averaged"])
        self.fabric.strategy.precision.load_state_dict(facts.get("scaler") or {})
