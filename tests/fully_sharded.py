"""A program that trains this package's layers under ``fully_shard``, as one process of two, each with half of a batch.
It fails where they end with other parameters than in one process with the whole batch.

Set LOCAL_RANK. Argument: a path of no file yet, at which the two processes meet.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rkl_kernels as rk


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        rk.TReLU(inplace=True),
        rk.SeparableConv2d(4, 6, 3, depthwise_bias=True, inner_activation="silu", activation="relu6"),
        rk.DepthwiseConv2d(6, 3, padding="same"),
        rk.SeparableConv2d(6, 5, 3, padding_mode="reflect", padding=1, activation="gelu"),
    )


def train(net: nn.Module, images: Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (net(images) - 1).square().mean().backward()
        optimizer.step()


def nothing(net: nn.Sequential) -> list[nn.Module]:
    return []


def layers(net: nn.Sequential) -> list[nn.Module]:
    return [layer for layer in net if list(layer.parameters())]


def steps(net: nn.Sequential) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d)]


def check(apart: Callable[[nn.Sequential], list[nn.Module]], convert_first: bool, rank: int) -> None:
    """``apart``: what is sharded by itself, before the model. It is whole in its own forward and backward only."""
    whole, net, images = model(), model(), torch.randn(4, 4, 9, 8)
    before = [parameter.detach().clone() for parameter in whole.parameters()]
    if convert_first:
        rk.convert(net)
    mesh = init_device_mesh("cpu", (2,))
    for unit in (*apart(net), net):
        fully_shard(unit, mesh=mesh)
    rk.convert(net)
    assert isinstance(net[0], rk.DepthwiseConv2d)
    train(whole, images)
    train(net, images.chunk(2)[rank])
    for (name, ours), wanted, start in zip(net.named_parameters(), whole.parameters(), before, strict=True):
        torch.testing.assert_close(ours.full_tensor(), wanted, rtol=1e-4, atol=1e-5, msg=name)
        assert (wanted - start).abs().max() > 1e-3, name
    assert rk.restore(net) == ["0"]
    torch.testing.assert_close(net(images), whole(images), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    for apart, convert_first in ((nothing, True), (nothing, False), (layers, True), (steps, True)):
        check(apart, convert_first, rank)
    dist.destroy_process_group()
