"""Turns any network into the form that is used after training, so that sizes and latencies can be compared."""

from __future__ import annotations

import copy
from collections import Counter

import torch.fx
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .model import ResNet


def deployed(model: nn.Module) -> nn.Module:
    """A copy in eval mode, with batch norms folded into the convolutions before them. The project's own networks lose
    their shallow heads too, as by ``ResNet.deploy``. Equivalent to ``model.eval()`` up to rounding.

    Examples:
        >>> from rkl.network.deployed import deployed
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> deployed(model)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    return model.deploy() if isinstance(model, ResNet) else _folded(model)


class _Layers(torch.fx.Tracer):
    """Traces a model down to its layers. timm's norms with an activation and ``rk``'s convolutions count as layers."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(module, name)


def _folded(model: nn.Module) -> nn.Module:
    whole = copy.deepcopy(model).eval().requires_grad_(False)
    calls = [node for node in _Layers().trace(whole).nodes if node.op == "call_module"]
    times = Counter(whole.get_submodule(str(node.target)) for node in calls)
    for node in calls:
        norm, before = whole.get_submodule(str(node.target)), node.all_input_nodes[0]
        if not isinstance(norm, nn.BatchNorm2d) or before not in calls or len(before.users) > 1:
            continue
        conv = whole.get_submodule(str(before.target))
        if isinstance(conv, nn.Conv2d) and times[conv] == times[norm] == 1:
            whole.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
            whole.set_submodule(str(node.target), getattr(norm, "act", nn.Identity()))
    return whole
