"""Intervals against SciPy's own tests, verdicts at their borders, and what cannot be in the paper's tables."""

import numpy as np
import pytest
from scipy import stats

from rkl.comparison import Estimate, estimate, impossible, paired_difference, verdict


def test_interval_agrees_with_scipy():
    values = [0.91, 0.93, 0.92, 0.95]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = estimate(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n == 4


def test_paired_difference_agrees_with_scipy_and_uses_shared_seeds():
    ours, theirs = {0: 0.9, 1: 0.8, 2: 0.95, 7: 0.1}, {0: 0.88, 1: 0.79, 2: 0.90, 5: 0.99}
    expected = stats.ttest_rel([0.9, 0.8, 0.95], [0.88, 0.79, 0.90]).confidence_interval(0.95)
    found = paired_difference(ours, theirs)
    assert (found.low, found.high, found.n) == (pytest.approx(expected.low), pytest.approx(expected.high), 3)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_one_run_has_no_interval_and_decides_nothing():
    assert estimate([0.5]).half is None
    assert verdict(estimate([0.5]), negligible=0.1) == "not decided"


@pytest.mark.parametrize(
    ("mean", "half", "expected"),
    [
        (2, 1, "helps"),
        (-2, 1, "harms"),
        (0.1, 1, "not decided"),
        (0.05, 0.1, "does nothing"),
        (0.15, 0.05, "does nothing"),
    ],
)
def test_verdicts(mean, half, expected):
    assert verdict(Estimate(mean, half, 3), negligible=0.2) == expected


def test_f1_bound_holds_for_any_predictions_on_balanced_classes():
    generator = np.random.default_rng(0)
    for _ in range(200):
        confusion = generator.dirichlet(np.full(5, generator.uniform(0.05, 2)), size=5)
        recall = np.diag(confusion)
        f1 = 2 * recall / (1 + confusion.sum(0))
        assert not impossible(100 * recall.mean(), 100 * recall.mean(), 100 * f1.mean())
    assert impossible(82.03, 97.217, 94.7) == {"recall", "f1"}
    assert impossible(84.75, 96.416, 87.0) == {"recall"}
