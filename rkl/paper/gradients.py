"""Measures the share of each loss term in the gradient of the weights that remain after deployment."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..distill import LossWeights, gammas, training_losses
from ..training.checkpoint import open_run
from ..training.evaluation import default_device
from ..training.files import to_json, write_text
from ..training.images import load_data
from ..training.train import class_balance, outputs, steps_an_epoch, training_batches

BATCHES = 4


def gradient_norms(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    weights: LossWeights,
    l1: float = 0.0,
    balance: Tensor | None = None,
) -> dict[str, float]:
    """The mean L2 norm of each term's gradient over the batches, in training mode. The gradient is with respect to the
    parameters that the deepest head uses, since these remain after deployment.

    Terms are those of :func:`rkl.distill.training_losses`, and l1, which is lambda * sum |gamma| with ``l1`` as lambda.
    ``balance``: the weights of the classes in the cross entropy.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    for images, labels in batches:
        losses = training_losses(outputs(model(images)), labels, weights, balance)
        parameters = list(model.parameters())
        deepest = torch.autograd.grad(losses["deepest"], parameters, retain_graph=True, allow_unused=True)
        kept = [p for p, g in zip(parameters, deepest, strict=True) if g is not None]
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, kept, retain_graph=True, allow_unused=True)
            norm = torch.stack([g.square().sum() for g in found if g is not None]).sum().sqrt()
            sums[name] = sums.get(name, norm.new_zeros(())) + norm
        count += 1
    model.eval()
    model.load_state_dict(state)  # the batches have changed the running statistics of batch norm
    norms = {name: float(total) / count for name, total in sums.items()}
    used = {id(parameter) for parameter in kept}
    return norms | {"l1": l1 * sum(int(gamma.count_nonzero()) for gamma in gammas(model) if id(gamma) in used) ** 0.5}


def shares(norms: dict[str, float]) -> dict[str, float]:
    """Each norm divided by the sum of all norms."""
    total = sum(norms.values())
    return {name: norm / total for name, norm in norms.items()} if total else dict.fromkeys(norms, 0.0)


def record_gradients(folder: Path) -> None:
    """Measure a finished run's gradient norms at its last weights, on the training batches that a further epoch would
    have, and write gradients.json into the run's folder. L1 has its weight of the first epoch."""
    run = open_run(folder, device=default_device())
    config, data = run.config, load_data(run.config).to(run.device)
    loader = training_batches(config, data, config.epochs, drop_last=True)
    batches = (batch for batch, _ in zip(loader, range(BATCHES), strict=False))
    l1 = config.l1_at(0, steps_an_epoch(config, len(data.train)))
    norms = gradient_norms(run.model, batches, config.loss, l1, class_balance(config, data))
    write_text(folder / "gradients.json", to_json({"norms": norms, "shares": shares(norms)}, indent=1))
