"""What a few seeds allow to say: means with t intervals, paired differences, and a verdict in plain words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import t as student

Verdict = Literal["helps", "does nothing", "harms", "not decided"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` runs; the interval's half width is None for a single run."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        return float("-inf") if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        return float("inf") if self.half is None else self.mean + self.half


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half width of the 95% t interval: t(0.975, n - 1) * s / sqrt(n)."""
    n = len(values)
    if n == 0:
        raise ValueError("values must hold at least one run, got none")
    mean = statistics.fmean(values)
    if n == 1:
        return Estimate(mean, None, 1)
    half = float(student.ppf(0.5 + CONFIDENCE / 2, n - 1)) * statistics.stdev(values) / n**0.5
    return Estimate(mean, half, n)


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Estimate | None:
    """The mean of ours - theirs over the seeds that both have; None where they share none."""
    shared = sorted(ours.keys() & theirs.keys())
    return estimate([ours[seed] - theirs[seed] for seed in shared]) if shared else None


def verdict(difference: Estimate, negligible: float) -> Verdict:
    """What the interval of a difference (larger is better) allows to say.

    It helps or harms where the interval lies on one side of zero, does nothing where it lies within ``negligible`` of
    zero, and is not decided otherwise.
    """
    if -negligible <= difference.low and difference.high <= negligible:
        return "does nothing"
    if difference.low > 0:
        return "helps"
    if difference.high < 0:
        return "harms"
    return "not decided"


def f1_ceiling(accuracy: float) -> float:
    """The most that macro F1 can be at an accuracy A on equally many images a class: 2A / (1 + A), both in percent.

    A class's F1 is at most 2r / (1 + r) of its recall r (at precision 1); that is concave, and the mean recall is A.
    """
    return 200 * accuracy / (100 + accuracy)


def impossible(accuracy: float, recall: float, f1: float) -> set[str]:
    """Which of "recall" and "f1" cannot be (all in percent) on a test set with equally many images a class, where
    macro recall is the accuracy; 0.05 points are left for rounding."""
    found = set()
    if abs(recall - accuracy) > 0.05:
        found.add("recall")
    if f1 > f1_ceiling(accuracy) + 0.05:
        found.add("f1")
    return found
