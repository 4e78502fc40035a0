"""The losses of self-distillation: logit distillation (equation 2), feature distillation, L1 on batch norm's gamma."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network.model import Exits


@dataclass(frozen=True)
class LossWeights:
    """The weights of the loss terms.

    Attributes:
        x: share of the teacher in a shallow head's loss (equation 2); 0 is deep supervision alone.
        temperature: T, by which both the student's and the teacher's logits are divided.
        t_squared: multiply the teacher's term by T^2, so that its gradient keeps its size when T changes.
        heads: weight of every shallow head's whole loss.
        beta: weight of feature distillation.
        legacy_features: use one norm over the whole batch, as "Be Your Own Teacher" does; it grows with the batch.
        l1: lambda of the L1 penalty on gamma (table I), which ends with the last cut. The default moves a gamma that no
            other gradient holds to 0 by then, but is at most 0.001; without cuts it is 0.
        smoothing: label smoothing in every head's cross entropy with the labels.

    Raises:
        ValueError: a weight outside its range.

    Examples:
        >>> from rkl.distill import LossWeights
        >>> LossWeights(beta=0).x  # logit distillation alone
        0.1
    """

    x: float = 0.1
    temperature: float = 3.0
    t_squared: bool = True
    heads: float = 1.0
    beta: float = 0.03
    legacy_features: bool = False
    l1: float | None = None
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.x <= 1:
            raise ValueError(f"x must be between 0 and 1, got {self.x}")
        if not 1e-100 <= self.temperature <= 1e100:  # its square must be a finite float, too
            raise ValueError(f"temperature must be between 1e-100 and 1e100, got {self.temperature}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {self.smoothing}")
        for name in ("heads", "beta", "l1"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0, got {value}")


def logit_distillation(student: Tensor, teacher: Tensor, temperature: float, t_squared: bool = True) -> Tensor:
    """T^2 * CE(student / T, softmax(teacher / T)) with the teacher detached (equation 2's first term, without x).

    Both sides are divided by T. If only the teacher were, the target would be nearly uniform at the student's scale,
    and the term would be label smoothing.

    Args:
        student: (N, classes) logits.
        teacher: (N, classes) logits; no gradient reaches them.
        temperature: T.
        t_squared: whether the loss is multiplied by T^2.

    Returns:
        A scalar, the mean over the batch.

    Examples:
        >>> from rkl.distill import logit_distillation
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> kept, turned = (logit_distillation(student, logits, 3.0) for student in (logits, -logits))
        >>> bool(kept < turned)
        True
    """
    loss = F.cross_entropy(student / temperature, torch.softmax(teacher.detach() / temperature, dim=1))
    return loss * temperature**2 if t_squared else loss


FAINT = 1e-3
"""The L2 norm below which a feature map counts as nearly zero. The gradient of a sample is at most 4 / FAINT. With
torch's own 1e-12 a map of zeros spoils all weights, and in fp16, where 1e-12 is 0, the loss is nan. Batch norm makes
values of about 1, and takes deviations below 0.003 for none, so the maps of a network that learns have larger norms."""


def feature_distillation(student: Tensor, teacher: Tensor, legacy: bool = False) -> Tensor:
    """Squared distance of the L2-normalised feature maps, averaged over the samples. The teacher is detached.

    For one sample it is 2 - 2 cos of the angle between the two maps, for any size of map and batch. A map of a norm
    below :data:`FAINT` is divided by FAINT instead of the norm, so that the gradient stays bounded. With ``legacy`` it
    is ``torch.dist`` of the maps, one norm over the whole batch (Zhang et al., 2019, "Be Your Own Teacher").

    Args:
        student: (N, C, H, W), or any shape with samples first.
        teacher: of the same shape; no gradient reaches it.
        legacy: whether to use the norm over the whole batch.

    Returns:
        A scalar, from 0 to 4.

    Examples:
        >>> from rkl.distill import feature_distillation
        >>> features = torch.randn(2, 8, 4, 4)
        >>> round(float(feature_distillation(-features, features)), 4)
        4.0
    """
    if legacy:
        return torch.dist(student, teacher.detach())
    student, teacher = student.flatten(1), teacher.detach().flatten(1)
    return (F.normalize(student, eps=FAINT) - F.normalize(teacher, eps=FAINT)).square().sum(1).mean()


def training_losses(
    exits: Exits, labels: Tensor, weights: LossWeights, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """The weighted terms of the training loss, which is their sum. Terms that the model does not have are left out.

    Args:
        exits: every head's output, shallow to deep; the deepest is the teacher.
        labels: (N,) classes, or (N, classes) soft labels as CutMix gives them.
        weights: weights of the terms.
        class_weights: (classes,) weights for the cross entropy with the labels.

    Returns:
        deepest: plain cross entropy of the deepest head. heads: (1 - x) * cross entropy, summed over the shallow heads.
        logits: x * logit distillation, summed likewise. feature: beta * feature distillation, summed likewise.

    Examples:
        >>> from rkl.distill import LossWeights, training_losses
        >>> from rkl.network.model import ResNetKL
        >>> exits = ResNetKL(10, width=16)(torch.randn(4, 3, 32, 32))
        >>> losses = training_losses(exits, torch.tensor([0, 1, 2, 3]), LossWeights())
        >>> list(losses)
        ['deepest', 'heads', 'logits', 'feature']
        >>> sum(losses.values()).backward()
    """
    *shallow, deepest = exits.logits

    def with_labels(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, class_weights, label_smoothing=weights.smoothing)

    losses = {"deepest": with_labels(deepest)}
    if shallow:
        own = [with_labels(logits) for logits in shallow]
        taught = [logit_distillation(logits, deepest, weights.temperature, weights.t_squared) for logits in shallow]
        losses["heads"] = weights.heads * (1 - weights.x) * torch.stack(own).sum()
        losses["logits"] = weights.heads * weights.x * torch.stack(taught).sum()
    if len(exits.features) > 1:
        *students, teacher = exits.features
        distances = [feature_distillation(student, teacher, weights.legacy_features) for student in students]
        losses["feature"] = weights.beta * torch.stack(distances).sum()
    return losses


def gammas(model: nn.Module) -> list[nn.Parameter]:
    """The gains (gamma) of the batch norm layers.

    Examples:
        >>> from rkl.distill import gammas
        >>> [gamma.shape for gamma in gammas(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))]
        [torch.Size([8])]
    """
    norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    return [norm.weight for norm in norms if norm.weight is not None]


@torch.no_grad()
def add_l1_gradient(model: nn.Module, l1: float, scale: Tensor | float = 1.0) -> None:
    """Add the subgradient of l1 * sum |gamma| over the batch norm layers. Call it between backward and step.

    It takes three kernels at any depth of the model. As a term of the loss it would take hundreds in backward.

    Args:
        model: any module; norms without a gradient are left out.
        l1: lambda.
        scale: the scale of a gradient scaler, by which the other terms' gradients are multiplied.

    Examples:
        >>> from rkl.distill import add_l1_gradient
        >>> norm = nn.BatchNorm2d(2)
        >>> (0 * norm(torch.randn(4, 2, 3, 3))).sum().backward()
        >>> add_l1_gradient(norm, 0.5)
        >>> norm.weight.grad
        tensor([0.5000, 0.5000])
    """
    found = [(gamma, gamma.grad) for gamma in gammas(model) if gamma.grad is not None]
    if not found:
        return
    signs = torch._foreach_sign([gamma for gamma, _ in found])
    torch._foreach_mul_(signs, l1 * scale)
    torch._foreach_add_([gradient for _, gradient in found], signs)


@torch.no_grad()
def gamma_l1(model: nn.Module) -> float:
    """Sum of |gamma| over the batch norm layers.

    Examples:
        >>> from rkl.distill import gamma_l1
        >>> gamma_l1(nn.BatchNorm2d(8))
        8.0
    """
    found = [*gammas(model)]
    return float(sum(torch._foreach_norm(tuple(found), 1), torch.zeros(()))) if found else 0.0
