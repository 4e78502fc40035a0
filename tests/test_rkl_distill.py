"""The losses against their formulas, which are written out by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from rkl.distill import (
    FAINT,
    LossWeights,
    add_l1_gradient,
    feature_distillation,
    gamma_l1,
    logit_distillation,
    training_losses,
)
from rkl.network.model import Exits


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def cross_entropy(logits: list[list[float]], targets: list[list[float]]) -> float:
    rows = [
        -sum(t * math.log(p) for t, p in zip(target, softmax(row), strict=True))
        for row, target in zip(logits, targets, strict=True)
    ]
    return sum(rows) / len(rows)


@pytest.fixture
def exits() -> Exits:
    torch.manual_seed(0)
    logits = tuple(torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    features = tuple(torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    return Exits(logits, features)


@pytest.mark.parametrize("soft", [False, True])
def test_terms_equal_the_formulas(exits: Exits, soft: bool) -> None:
    weights = LossWeights(x=0.3, temperature=3.0, heads=0.5, beta=0.2)
    assert weights.t_squared
    hard = torch.tensor([0, 3, 1])
    labels = torch.tensor([[0.7, 0, 0.3, 0], [0, 0.5, 0, 0.5], [0, 1, 0, 0]], dtype=torch.float64) if soft else hard
    targets = labels.tolist() if soft else torch.nn.functional.one_hot(hard, 4).double().tolist()
    *shallow, deepest = [t.tolist() for t in exits.logits]
    teacher = [softmax([value / 3.0 for value in row]) for row in deepest]
    losses = training_losses(exits, labels, weights)
    expected = {
        "deepest": cross_entropy(deepest, targets),
        "heads": 0.5 * 0.7 * sum(cross_entropy(logits, targets) for logits in shallow),
        "logits": 0.5 * 0.3 * 9 * sum(cross_entropy(divided(logits, 3.0), teacher) for logits in shallow),
        "feature": 0.2 * sum(mean_squared_angle(f, exits.features[-1]) for f in exits.features[:-1]),
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-12), name


def test_classes_are_weighed_by_a_mean(exits: Exits) -> None:
    """Each sample counts by the weight of its class, and the weights are normalised to a sum of one."""
    logits, labels, weights = exits.logits[-1], [0, 3, 1], [1.0, 2.0, 3.0, 5.0]
    losses = training_losses(
        Exits((logits,)), torch.tensor(labels), LossWeights(), torch.tensor(weights, dtype=torch.float64)
    )
    own = [weights[k] * -math.log(softmax(row)[k]) for row, k in zip(logits.tolist(), labels, strict=True)]
    assert losses["deepest"].item() == pytest.approx(sum(own) / (1.0 + 5.0 + 2.0), rel=1e-12)


def divided(logits: list[list[float]], temperature: float) -> list[list[float]]:
    return [[value / temperature for value in row] for row in logits]


def test_a_student_that_equals_its_teacher_is_not_pulled(exits: Exits) -> None:
    """If only the teacher's side were divided by T, equal logits would be pulled towards the uniform distribution."""
    student = exits.logits[0]
    (gradient,) = torch.autograd.grad(logit_distillation(student, student, 3.0), student)
    assert float(gradient.abs().max()) < 1e-12


def mean_squared_angle(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """2 - 2 cos of the angle between the two maps of each sample."""
    values = []
    for a, b in zip(student.flatten(1).tolist(), teacher.flatten(1).tolist(), strict=True):
        cosine = sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
        values.append(2 - 2 * cosine)
    return sum(values) / len(values)


def test_nothing_is_taught_back_to_the_teacher(exits: Exits) -> None:
    losses = training_losses(exits, torch.tensor([0, 3, 1]), LossWeights())
    (losses["logits"] + losses["feature"]).backward()
    assert exits.logits[-1].grad is None
    assert exits.features[-1].grad is None
    assert all(t.grad is not None for t in (*exits.logits[:-1], *exits.features[:-1]))


def test_t_squared_and_legacy_forms(exits: Exits) -> None:
    student, *_, teacher = exits.logits
    plain = logit_distillation(student, teacher, 2.0, t_squared=False)
    assert logit_distillation(student, teacher, 2.0).item() == pytest.approx(4 * plain.item())
    a, *_, b = exits.features
    distance = sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) ** 0.5
    assert feature_distillation(a, b, legacy=True).item() == pytest.approx(distance, rel=1e-12)


def test_features_distance_does_not_depend_on_the_batch(exits: Exits) -> None:
    a, *_, b = exits.features
    twice = feature_distillation(torch.cat([a, a]), torch.cat([b, b]))
    assert float(twice) == pytest.approx(float(feature_distillation(a, b)), rel=1e-12)


TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [0.0, 1e-6, 4e-5])
def test_a_map_of_nearly_zero_is_pulled_gently(size: float, dtype: torch.dtype) -> None:
    """A gradient of 1e11, as of a division by torch's eps, would spoil all weights. A teacher of zeros does no harm."""
    torch.manual_seed(0)
    maps = torch.randn(2, 8, 4, 4)
    maps[0] *= size
    student, teacher = maps.to(dtype).requires_grad_(), torch.randn(2, 8, 4, 4).to(dtype)
    loss = feature_distillation(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert 0 < float(loss) < 4
    assert 0 < float(gradient[0].double().norm()) <= 4 / FAINT
    assert float((gradient[0].double() * teacher[0].double()).sum()) < 0, "towards the teacher"
    backward = feature_distillation(teacher.requires_grad_(), student)
    assert math.isfinite(float(backward))
    assert bool(torch.autograd.grad(backward, teacher)[0].isfinite().all())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_ordinary_maps_are_normalised_as_by_torch(size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student, teacher = ((size * torch.randn(3, 8, 4, 4)).to(dtype).requires_grad_() for _ in range(2))
    by_torch = (F.normalize(student.flatten(1)) - F.normalize(teacher.detach().flatten(1))).square().sum(1).mean()
    ours = feature_distillation(student, teacher)
    assert torch.equal(ours, by_torch)
    assert torch.equal(*(torch.autograd.grad(loss, student)[0] for loss in (ours, by_torch)))


def test_a_model_with_one_output_has_one_term(exits: Exits) -> None:
    assert training_losses(Exits(exits.logits[:1]), torch.tensor([0, 3, 1]), LossWeights()).keys() == {"deepest"}


def test_smoothing_gives_every_class_its_part(exits: Exits) -> None:
    """Of a smoothing of 0.2 each of the four classes gets 0.05, in the heads too."""
    labels = torch.tensor([0, 3, 1])
    targets = [[0.85 if c == label else 0.05 for c in range(4)] for label in labels.tolist()]
    losses = training_losses(exits, labels, LossWeights(smoothing=0.2, x=0.25))
    *shallow, deepest = (cross_entropy(logits.tolist(), targets) for logits in exits.logits)
    assert float(losses["deepest"]) == pytest.approx(deepest)
    assert float(losses["heads"]) == pytest.approx(0.75 * LossWeights().heads * sum(shallow))


def test_l1_gradient_is_the_sign_of_gamma() -> None:
    norm = torch.nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 0.0]))
    norm.weight.grad = torch.ones(3)
    add_l1_gradient(norm, 0.25)
    assert norm.weight.grad.tolist() == [1.25, 0.75, 1.0]
    assert gamma_l1(norm) == 2.5
    add_l1_gradient(norm, 0.25, torch.tensor(4.0))
    assert norm.weight.grad.tolist() == [2.25, -0.25, 1.0], "scaled as a gradient scaler scales the other terms"


@pytest.mark.parametrize(
    ("name", "value"), [("x", 1.5), ("temperature", 0.0), ("beta", -1.0), ("heads", float("nan")), ("smoothing", 1.0)]
)
def test_weights_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must .*got {value}"):
        LossWeights(**{name: value})
