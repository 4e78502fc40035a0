"""Pruning: channels that belong together are cut together, and training goes on as if they had never been there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rkl.distill import LossWeights, training_losses
from rkl.network.blocks import BlockOptions
from rkl.network.model import ResNet, ResNetKL, all_exits
from rkl.slimming import pruning
from rkl.slimming.channels import Cut, apply_cut, apply_plan, channel_plan, narrow

MODELS = {
    "kl18": lambda: ResNetKL(5, 18, 10, 2, 8),
    "kl50-mixed": lambda: ResNetKL(5, 50, 10, 2, 8, BlockOptions(scale_mode="mixed")),
    "plain18": lambda: ResNet(5, 18, 10, 2, 8),
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 2, 8, 8, generator=generator), torch.arange(6) % 5


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    images, labels = batch()
    model.train()
    output = model(images)
    losses = training_losses(output if isinstance(output, tuple) else all_exits(model, images), labels, LossWeights())
    total = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return total.item()


def silence(model: nn.Module, cut: Cut) -> None:
    """Zero gamma and beta of the channels that a cut will take, so that nothing reaches the layers after them."""
    parameters = dict(model.named_parameters())
    for name, kept in cut.items():
        owner = model.get_submodule(name.rpartition(".")[0]) if name in parameters else None
        if isinstance(owner, nn.BatchNorm2d):
            gone = torch.ones(len(parameters[name]), dtype=torch.bool)
            gone[kept[0]] = False
            parameters[name].data[gone] = 0


@pytest.mark.parametrize("channels", [9, 17, 18, 36, 64])
def test_a_larger_ratio_keeps_no_more(channels: int) -> None:
    kept = [pruning.channels_kept(channels, percent / 100) for percent in range(1, 100)]
    assert kept == sorted(kept, reverse=True)
    assert all(count >= channels * (1 - percent / 100) for percent, count in zip(range(1, 100), kept, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_cutting_silent_channels_changes_nothing(name: str) -> None:
    """Channels whose batch norm gives zero contribute nothing to the layers after them, so the cut model is the same
    function. A gate's sigmoid of zero is one half, but it multiplies a channel that is zero itself."""
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        step(model, optimizer)
    images, _ = batch()
    model.eval()
    cut = pruning.plan_cut(model, images, 0.3)
    silence(model, cut)
    with torch.no_grad():
        expected = all_exits(model, images)
        before = channel_plan(model)
        apply_cut(model, cut)
        for ours, theirs in zip(all_exits(model, images).logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    after = channel_plan(model)
    assert sum(map(sum, after.values())) < sum(map(sum, before.values()))


@pytest.mark.parametrize("name", MODELS)
def test_training_goes_on_after_a_cut(name: str) -> None:
    """Momentum and the follower lose the same channels as the parameters. The next step reaches all that are left."""
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(3):
        step(model, optimizer)
    follower = copy.deepcopy(model)
    momenta = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    cut = pruning.prune(model, batch()[0], 0.3, optimizer, [follower])
    for n, parameter in model.named_parameters():
        kept = cut.get(n, {})
        assert torch.equal(parameter, narrow(weights[n], kept)), n
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], narrow(momenta[n], kept)), n
    assert len(optimizer.state) == len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    for (n, ours), theirs in zip(model.state_dict().items(), follower.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), n
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(p.grad.any() for p in model.parameters())


def test_the_least_important_channels_leave() -> None:
    torch.manual_seed(0)
    model = ResNet(5, 18, 10, 2, 8)
    unit = model.stages[0][0].branch[0]
    with torch.no_grad():
        unit.conv.weight[[1, 4, 7]] *= 1e-3
        unit.norm.weight[[1, 4, 7]] = 1e-3
    cut = pruning.plan_cut(model, batch()[0], 0.3)
    kept = set(cut["stages.0.0.branch.0.conv.weight"][0].tolist())
    assert len(kept) == pruning.channels_kept(10, 0.3) == 8
    assert len(kept & {1, 4, 7}) == 1


def test_importance_is_a_sum_of_each_layers_shares() -> None:
    """It adds the shares of the filter and of gamma, each over its layer's mean. Later layers have no part in it."""
    torch.manual_seed(0)
    model = ResNet(5, 18, 10, 2, 8)
    unit = model.stages[0][0].branch[0]
    nn.init.normal_(unit.norm.weight)
    groups = pruning.channel_groups(model, batch()[0])
    (group,) = (g for g in groups if any(m[0] == "stages.0.0.branch.0.conv" and m[2] == "out" for m in g.members))
    filters, gammas = unit.conv.weight.detach().abs().sum((1, 2, 3)), unit.norm.weight.detach().abs()
    torch.testing.assert_close(group.importance(), filters / filters.mean() + gammas / gammas.mean())


def test_what_is_frozen_stays_so_through_a_cut() -> None:
    model = ResNet(5, 18, 10, 2, 8)
    model.stem.requires_grad_(False)
    pruning.prune(model, batch()[0], 0.3)
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert all(p.requires_grad for p in model.stages.parameters())


@pytest.mark.parametrize(
    ("channels", "ratio", "kept"),
    [
        (64, 0.2, 56),
        (512, 0.2, 416),
        (56, 0.2, 48),
        (40, 0.2, 32),
        (32, 0.2, 28),
        (16, 0.2, 14),
        (8, 0.2, 7),
        (4, 0.2, 4),
    ],
)
def test_channels_kept(channels: int, ratio: float, kept: int) -> None:
    """Multiples of 8 where the ratio spans 8 channels, else multiples of a smaller power of two. Never too few."""
    assert pruning.channels_kept(channels, ratio) == kept
    assert kept >= channels * (1 - ratio)


def test_a_ratio_of_nearly_one_leaves_a_channel() -> None:
    assert min(pruning.channels_kept(channels, 1 - 1e-13) for channels in range(1, 600)) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_rebuilds_the_pruned_model(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    images, _ = batch()
    pruning.prune(model, images, 0.3)
    again = MODELS[name]()
    apply_plan(again, channel_plan(model))
    again.load_state_dict(model.state_dict())
    model.eval()
    again.eval()
    with torch.no_grad():
        assert torch.equal(model(images), again(images))
        torch.testing.assert_close(again.deploy()(images), model(images), rtol=1e-4, atol=1e-4)
    assert channel_plan(again) == channel_plan(model)
    pruning.prune(again, images, 0.3)


def test_a_plan_of_another_model_is_refused() -> None:
    model = ResNet(5, 18, 4, 2, 8)
    with pytest.raises(ValueError, match="must name this model's layers"):
        apply_plan(model, channel_plan(ResNetKL(5, 18, 4, 2, 8)))
    plan = channel_plan(model)
    plan["fc"] = [33, 5]
    with pytest.raises(ValueError, match="channels in of fc must be between 1 and 32, got 33"):
        apply_plan(model, plan)
