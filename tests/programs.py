"""Random small models, random changes to them and random use: what a drop-in replacement must survive."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import rkl_kernels as rk

CHANNELS = 6
NORMS = (nn.BatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, lambda c: nn.BatchNorm2d(c, track_running_stats=False))
ACTIVATIONS = (nn.ReLU, lambda: nn.ReLU(inplace=True), nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Identity)
STEPS = ("call",) * 6 + (
    "tap", "loop", "slice", "residual", "again", "training", "flag", "no_grad", "count", "data", "in place",
)  # fmt: skip


class Net(nn.Module):
    """Calls its Sequentials by a list of steps. They may share layers."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_part(rng) for _ in range(rng.randint(1, 3)))
        if rng.random() < 0.3:
            _share(self.parts, rng)
        self.steps = [(rng.choice(STEPS), rng.randrange(len(self.parts))) for _ in range(rng.randint(1, 4))]
        self.flag = rng.random() < 0.5
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for kind, number in self.steps:
            x = self.step(kind, self.parts[number], x)
        return x

    def step(self, kind: str, part: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        if kind == "tap":
            middle = part[0](x)
            return part[1:](middle) + middle
        if kind == "loop":
            seen = [x := layer(x) for layer in part]
            return x + seen[0]
        if kind == "slice":
            return part[-1](part[:-1](x)) if len(part) > 1 else part(x)
        if kind == "residual":
            return x + part(x)
        if kind == "again":
            return part(part(x))
        if kind == "training":
            return part(x) if self.training else x - part(x)
        if kind == "flag":
            return part(x) if self.flag else part[0](x)
        if kind == "no_grad":
            with torch.no_grad():
                middle = part[0](x)
            return part[1:](middle) + 0.5 * x
        if kind == "count":
            self.calls += 1
            return part(x) * (1 + 0.1 * self.calls)
        if kind == "data":
            return part(x) if x.abs().mean() > 0.5 else part(-x)
        if kind == "in place":
            x = x * 1
            with torch.no_grad():
                middle = part[0](x)
            x.add_(1)
            return part[1:](middle) + x
        return part(x)


class WithArguments(Net):
    """The same with an optional argument, so that torch.fx cannot trace it."""

    def forward(self, x: torch.Tensor, again: bool = False) -> torch.Tensor:
        y = super().forward(x)
        return super().forward(y) if again else y


class Halved(nn.Conv2d):
    """A subclass whose forward computes something else, like timm's Conv2dSame."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def _depthwise(rng: random.Random) -> nn.Conv2d:
    size, mode = rng.choice((1, 3, 5)), rng.choice(("zeros", "zeros", "reflect", "circular"))
    padding = rng.choice((size // 2, "same"))
    kind = Halved if rng.random() < 0.15 else nn.Conv2d
    return kind(CHANNELS, CHANNELS, size, 1, padding, groups=CHANNELS, bias=rng.random() < 0.5, padding_mode=mode)


def _separable(rng: random.Random) -> rk.SeparableConv2d:
    inner, outer = rng.choice((None, "relu6", "silu")), rng.choice((None, None, "trelu"))
    bias = rng.random() < 0.5
    return rk.SeparableConv2d(CHANNELS, CHANNELS, 3, 1, 1, bias=bias, inner_activation=inner, activation=outer)


def _part(rng: random.Random) -> nn.Sequential:
    separable = rng.random() < 0.25
    layers: list[nn.Module] = [_separable(rng) if separable else _depthwise(rng)]
    for pointwise in (False, True)[separable:]:
        if pointwise and rng.random() < 0.8:
            layers.append(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=rng.random() < 0.5))
        if rng.random() < 0.7:
            layers.append(rng.choice(NORMS)(CHANNELS))
        if rng.random() < 0.6:
            layers.append(rng.choice(ACTIVATIONS)())
    if rng.random() < 0.2:
        layers[:2] = [nn.Sequential(*layers[:2])]
    return nn.Sequential(*layers)


def _share(parts: nn.ModuleList, rng: random.Random) -> None:
    """Put one layer in two places."""
    one, other = rng.choice(parts), rng.choice(parts)
    one[rng.randrange(len(one))] = other[rng.randrange(len(other))]


def build(seed: int) -> Net:
    """The model of a seed, the same each time."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    net = (Net if rng.random() < 0.8 else WithArguments)(rng)
    for module in net.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
    # Several norms in a row that use the batch's own statistics amplify rounding errors without bound. Only float64
    # leaves some digits.
    unbound = any(getattr(module, "track_running_stats", True) is False for module in net.modules())
    return net.double() if rng.random() < 0.5 or unbound else net


def _convolutions(net: nn.Module) -> list[nn.Conv2d]:
    """Convolutions whose weight is still a parameter. PyTorch cannot prune or parametrize the others again."""
    return [m for m in net.modules() if isinstance(m, nn.Conv2d) and "weight" in m._parameters]


def _hook(net: Net, rng: random.Random) -> None:
    rng.choice(list(net.modules())).register_forward_hook(lambda module, inputs, output: output * 1.25)


def _pre_hook(net: Net, rng: random.Random) -> None:
    rng.choice(list(net.modules())).register_forward_pre_hook(lambda module, inputs: (inputs[0] - 0.25, *inputs[1:]))


def _prune(net: Net, rng: random.Random) -> None:
    for conv in _convolutions(net)[:1]:
        prune.l1_unstructured(conv, "weight", amount=0.4)


def _parametrize(net: Net, rng: random.Random) -> None:
    for conv in _convolutions(net)[-1:]:
        parametrizations.weight_norm(conv)


def _replace(net: Net, rng: random.Random) -> None:
    part = rng.choice(net.parts)
    torch.manual_seed(rng.randrange(1000))
    new = rng.choice((nn.Identity(), nn.Tanh(), _depthwise(rng), nn.Conv2d(CHANNELS, CHANNELS, 1)))
    part[rng.randrange(len(part))] = new.to(next((p.dtype for p in net.parameters()), torch.float32))


def _own_forward(net: Net, rng: random.Random) -> None:
    module = rng.choice(list(net.parts.modules())[1:])
    was = module.forward
    module.forward = lambda x: was(x) + 0.5


def _freeze(net: Net, rng: random.Random) -> None:
    rng.choice(list(net.parts)).requires_grad_(False)


def _delete(net: Net, rng: random.Random) -> None:
    part = rng.choice(net.parts)
    if len(part) > 1:
        del part[rng.randrange(1, len(part))]


DONE: tuple[Callable[[Net, random.Random], None], ...] = (
    _hook, _pre_hook, _prune, _parametrize, _replace, _own_forward, _freeze, _delete,
)  # fmt: skip


def alter(net: Net, seed: int) -> None:
    """Change the model in up to two ways, the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(rng.choice((0, 1, 1, 2))):
        rng.choice(DONE)(net, rng)


def image(seed: int, like: nn.Module) -> torch.Tensor:
    dtype = next((p.dtype for p in like.parameters()), torch.float32)
    return torch.randn(2, CHANNELS, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
