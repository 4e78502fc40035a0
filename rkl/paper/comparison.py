"""What a few seeds can show: means with t intervals, and verdicts corrected for the number of comparisons."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy.stats import t as student

Verdict = Literal["helps", "does nothing", "harms", "not decided"]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` runs, and its standard error (None for a single run). Its interval is a t interval of 95%."""

    mean: float
    error: float | None
    n: int

    def half_at(self, confidence: float) -> float | None:
        """Half the width of the t interval: t((1 + confidence) / 2, n - 1) * s / sqrt(n)."""
        if self.error is None:
            return None
        return float(student.ppf(0.5 + confidence / 2, self.n - 1)) * self.error

    @property
    def half(self) -> float | None:
        return self.half_at(CONFIDENCE)

    @property
    def p(self) -> float:
        """The p-value of the two-sided t test that the mean is 0; 1 for a single run, which decides nothing."""
        if self.error is None:
            return 1.0
        if self.error == 0:
            return float(self.mean == 0)
        return 2 * float(student.sf(abs(self.mean) / self.error, self.n - 1))


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values and its standard error, s / sqrt(n)."""
    n = len(values)
    if n == 0:
        raise ValueError("values must hold at least one run, got none")
    return Estimate(statistics.fmean(values), statistics.stdev(values) / n**0.5 if n > 1 else None, n)


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> Estimate | None:
    """The mean of ours - theirs over the seeds that both have; None if they share no seed."""
    shared = sorted(ours.keys() & theirs.keys())
    return estimate([ours[seed] - theirs[seed] for seed in shared]) if shared else None


@dataclass(frozen=True)
class Judged:
    """A difference (larger is better), judged together with the others of its table by Holm's method.

    Attributes:
        confidence: of the interval, 1 - 0.05 / (hypotheses that were not rejected before this one's turn).
        low, high: the interval, infinite for a single run.
        p: the adjusted p-value. If p below 0.05 decides, the chance of any error in the table is at most 5%.
    """

    difference: Estimate
    confidence: float
    p: float
    verdict: Verdict

    @property
    def low(self) -> float:
        half = self.difference.half_at(self.confidence)
        return float("-inf") if half is None else self.difference.mean - half

    @property
    def high(self) -> float:
        half = self.difference.half_at(self.confidence)
        return float("inf") if half is None else self.difference.mean + half


def holm(differences: Sequence[Estimate], negligible: float) -> list[Judged]:
    """Judge the differences of one table together (Holm, 1979). The k-th smallest of m p-values is multiplied by
    m - k + 1, and then raised to the one before it where that is larger.

    A factor does nothing if its corrected interval lies within ``negligible`` of zero, whatever its p. Otherwise it
    helps or harms if its adjusted p is below 0.05, and else is not decided.
    """
    order = sorted(range(len(differences)), key=lambda i: differences[i].p)
    judged: dict[int, Judged] = {}
    smallest, rejected = 0.0, 0
    for rank, index in enumerate(order):
        difference = differences[index]
        smallest = max(smallest, min(1.0, (len(differences) - rank) * difference.p))
        found = Judged(difference, 1 - (1 - CONFIDENCE) / (len(differences) - rejected), smallest, "not decided")
        judged[index] = replace(found, verdict=_verdict(found, negligible))
        rejected += smallest < 1 - CONFIDENCE  # p-values only rise, so none is rejected after the first that is not
    return [judged[index] for index in range(len(differences))]


def _verdict(judged: Judged, negligible: float) -> Verdict:
    if -negligible <= judged.low and judged.high <= negligible:
        return "does nothing"
    if judged.p >= 1 - CONFIDENCE:
        return "not decided"
    return "helps" if judged.difference.mean > 0 else "harms"


def smallest_decidable(differences: Sequence[Estimate]) -> tuple[float, float, int] | None:
    """What a table can decide. Returns the median standard deviation of its paired differences, the smallest mean
    difference that is decided at that deviation (if no other is decided before), and the median number of seeds."""
    several = [(each.error, each.n) for each in differences if each.error is not None]
    if not several:
        return None
    deviation = statistics.median(error * n**0.5 for error, n in several)
    n = round(statistics.median(n for _, n in several))
    typical = Estimate(0.0, deviation / n**0.5, n)
    half = typical.half_at(1 - (1 - CONFIDENCE) / len(differences))
    assert half is not None  # an Estimate with an error has two runs or more
    return deviation, half, n


def f1_ceiling(accuracy: float) -> float:
    """The largest macro F1 at accuracy A, if all classes have equally many images: 2A / (1 + A). Both are in percent.

    A class of recall r has an F1 of at most 2r / (1 + r), at precision 1. This is concave, and the mean recall is A.
    """
    return 200 * accuracy / (100 + accuracy)


def impossible(accuracy: float, recall: float, f1: float) -> set[str]:
    """Which of "recall" and "f1" are impossible (all in percent) on a test set with equally many images a class. There
    macro recall equals the accuracy. 0.05 points are allowed for rounding."""
    found = set()
    if abs(recall - accuracy) > 0.05:
        found.add("recall")
    if f1 > f1_ceiling(accuracy) + 0.05:
        found.add("f1")
    return found
