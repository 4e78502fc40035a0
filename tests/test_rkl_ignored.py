"""A setting without an effect on the chosen network is refused, and no other setting is."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rkl_recipe import TINY

from rkl.config import Config
from rkl.distill import LossWeights, gammas, training_losses
from rkl.ignored import check_ignored, without_ignored
from rkl.network.build import build_model, model_names
from rkl.training import train as trainer

pytestmark = pytest.mark.usefixtures("one_thread", "no_plots")

NETWORKS = [
    *({"model": name} for name in model_names()),
    {"model": "resnet", "separable": True},
    {"model": "resnet", "separable": True, "scales": (3, 5)},
    {"model": "resnet", "exits": True},
    {"model": "resnet-kl", "exits": False},
    {"model": "resnet-kl", "scales": (5,)},
]
OPTIONS: dict[str, list[Any]] = {
    "depth": [34],
    "separable": [True, False],
    "dense_stages": [2],
    "scales": [(3, 7)],
    "scale_mode": ["mixed", "stage"],
    "gate": ["light", "none"],
    "activation": ["trelu", "relu"],
    "exits": [True, False],
    "exit_gate": ["none"],
    "feature_size": [1],
}
WEIGHTS: dict[str, Any] = {
    "x": 0.5,
    "temperature": 2.0,
    "t_squared": False,
    "heads": 0.5,
    "beta": 0.5,
    "legacy_features": True,
    "smoothing": 0.1,
}


def refused(config: Config) -> str:
    """What the check says; empty if it passes."""
    try:
        check_ignored(config)
    except ValueError as error:
        return str(error)
    return ""


@cache  # most configurations are asked for twice: as they are, and without what they ignore
def described(config: Config) -> tuple[str, int | None] | None:
    """A network's layers, and the size that its features are pooled to. None if the network cannot be built."""
    try:
        model = build_model(config, 10, 3, 32)
    except ValueError:
        return None
    return str(model), getattr(model, "feature_size", None)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(map(str, network.values())))
def test_an_option_is_refused_where_it_changes_nothing(network: dict[str, Any]) -> None:
    config = Config(width=8, **network)
    own = described(config)
    assert own
    assert not refused(config)
    for name, values in OPTIONS.items():
        changed = [replace(config, **{name: value}) for value in values if name not in network]
        found = [described(each) for each in changed]
        ignored = all(built == own for built in found)
        for each, built in zip(changed, found, strict=True):
            if ignored:
                assert refused(each).startswith(f"{name} must be left out for {config.model}"), name
                assert refused(each).endswith(f", got {getattr(each, name)}")
            else:
                assert built is None or not refused(each), name
            assert described(without_ignored(each)) == built


@pytest.mark.parametrize("network", NETWORKS[: len(model_names())] + NETWORKS[-3:-1], ids=str)
def test_a_loss_weight_is_refused_where_it_changes_no_term(network: dict[str, Any]) -> None:
    config, labels = Config(width=8, **network), torch.arange(4)
    model = build_model(config, 10, 3, 32)
    exits = trainer.outputs(model(torch.randn(4, 3, 32, 32)))
    own = training_losses(exits, labels, LossWeights())
    for name, value in WEIGHTS.items():
        weights = LossWeights(**{name: value})
        same = all(torch.equal(term, own[key]) for key, term in training_losses(exits, labels, weights).items())
        told = refused(replace(config, loss=weights))
        assert told.startswith(f"loss.{name} must be left out for {config.model}") == same, (name, told)
        assert (without_ignored(replace(config, loss=weights)).loss == LossWeights()) == same
    penalised = replace(config, loss=LossWeights(l1=0.1))
    assert bool(refused(penalised)) == (not gammas(model)), "L1 acts on the gains of batch norms"


@pytest.mark.parametrize("setting", [{"prune_ratio": 0.5}, {"importance": "taylor"}])
def test_how_to_cut_is_refused_without_a_cut(setting: dict[str, Any]) -> None:
    (name,) = setting
    for config in (Config(model="resnet"), Config(epochs=1), Config(prune_at=())):
        told = refused(replace(config, **setting))
        assert told.startswith(f"{name} must be left out for {config.model} without cuts, got ")
    for config in (Config(), Config(model="resnet", prune_at=(0.5,))):
        assert not refused(replace(config, **setting))


def test_settings_of_the_data_that_nothing_reads() -> None:
    assert refused(Config(mixup=0.2)) == (
        "mixup must go with a cutmix_probability below 1 or without cutmix, as CutMix takes every batch, got 0.2"
    )
    assert not refused(Config(mixup=0.2, cutmix=False))
    assert not refused(Config(mixup=0.2, cutmix_probability=0.5))
    told = refused(Config(cutmix=False, cutmix_probability=0.5))
    assert told == "cutmix_probability must be left out for resnet-kl without cutmix, got 0.5"
    assert without_ignored(Config(cutmix=False, cutmix_probability=0.5)) == Config(cutmix=False)
    for data in ("digits", "folder:a-lt"):
        told = refused(Config(data=data, imbalance=10.0))
        assert told == f"imbalance must go with a long-tailed data set (-lt), got 10.0 for {data}"
    assert not refused(Config(data="digits-lt", imbalance=10.0))


def test_a_run_is_refused_before_it_writes(tmp_path: Path) -> None:
    """A square of the images' own side may still leave a part of many."""
    config = replace(TINY, out=tmp_path / "run", epochs=1)
    for setting, message in (
        ({"cutout": 9}, "cutout must be at most the images' side of 8 pixels, got 9; lower it"),
        ({"model": "resnet", "exit_gate": "none"}, "exit_gate must be left out for resnet without exits, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.train(replace(config, **setting))
    assert not config.out.exists()
    trainer.train(replace(config, cutout=8))
