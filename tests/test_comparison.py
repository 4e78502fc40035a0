"""Intervals against SciPy's own tests, verdicts at their limits, and figures that a paper's table cannot hold."""

from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
from scipy import stats
from torch import nn

from rkl.paper import latency, records, tables
from rkl.paper.comparison import Estimate, estimate, holm, impossible, paired_difference, smallest_decidable
from rkl.paper.rows import Factor


def test_interval_agrees_with_scipy():
    values = [0.91, 0.93, 0.92, 0.95]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = estimate(values)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((expected.low, expected.high))
    assert found.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert found.n == 4


def test_paired_difference_agrees_with_scipy_and_uses_shared_seeds():
    ours, theirs = {0: 0.9, 1: 0.8, 2: 0.95, 7: 0.1}, {0: 0.88, 1: 0.79, 2: 0.90, 5: 0.99}
    expected = stats.ttest_rel([0.9, 0.8, 0.95], [0.88, 0.79, 0.90]).confidence_interval(0.95)
    found = paired_difference(ours, theirs)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((expected.low, expected.high))
    assert found.n == 3
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_estimates_pair_by_seed():
    def run(seed, accuracy):
        return records.Run(seed, {}, {"test": [{"accuracy": accuracy}]}, [], {})

    results = records.Results(
        "table5", "digits", "cpu", {"a": [run(0, 0.9), run(1, 0.8)], "b": [run(1, 0.7), run(2, 0.1)]}, 6
    )
    assert results.difference("a", "b", lambda r: r.deepest["accuracy"]) == estimate([0.8 - 0.7])
    assert results.difference("a", "c", lambda r: r.deepest["accuracy"]) is None


def test_training_times_of_other_days_are_not_compared():
    def runs(*days, seconds=60):
        size = {"parameters": 1, "deployed_parameters": 1, "macs": 1}
        metrics = {"size": size, "seconds": seconds, "data_share": 0.0, "peak_memory_bytes": 0}
        moments = [datetime(2026, 11, day, tzinfo=timezone.utc) for day in days]
        return [records.Run(s, {}, metrics, [], {}, day) for s, day in enumerate(moments)]

    rows = {"ResNet": runs(1, 3, 5), "near": runs(2, 4, seconds=90), "far": runs(5, 9), "unknown": runs(1)}
    rows["unknown"] = [replace(run, looked_at=None) for run in rows["unknown"]]
    results = records.Results("table5", "digits", "cpu", rows, 8)
    said = {row: tables._ratios(results, {}, Factor("", row, "ResNet")) for row in rows}
    assert "1.50 of the training time" in said["near"]
    assert all("training times not compared" in said[row] for row in ("far", "unknown"))
    assert "not known to have run within 2 days" in tables._cost(results, {})
    assert "2 days" not in tables._cost(replace(results, rows={"ResNet": rows["ResNet"], "near": rows["near"]}), {})


def test_each_row_is_timed_on_images_of_its_own_size(monkeypatch):
    """Tables that share no finished row may be of several sizes. All were timed at that of the first."""
    seen = []

    class Noting(nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape))

    def results(table, row, *image):
        run = records.Run(0, {}, {"plan": {}, "image": image}, [], {})
        return records.Results(table, "digits", "smoke", {row: [run]}, 1)

    monkeypatch.setattr(latency, "rebuilt", lambda run: Noting())
    monkeypatch.setattr(latency, "REPEATS", 2)
    first, second = latency.measure([results("table2", "VGG", 1, 16), results("table5", "ResNet + logic", 3, 8)])
    assert (list(first), list(second)) == (["VGG"], ["ResNet + logic"])
    assert seen == [(16, 1, 16, 16), (16, 3, 8, 8)] * 4


def test_one_run_has_no_interval_and_decides_nothing():
    assert estimate([0.5]).half is None
    (judged,) = holm([estimate([0.5])], negligible=0.1)
    assert (judged.verdict, judged.p, judged.low) == ("not decided", 1.0, float("-inf"))


def with_p(p, n=5, mean=1.0):
    """A difference whose t test has this p-value."""
    return Estimate(mean, abs(mean) / stats.t.isf(p / 2, n - 1), n)


def test_holm_on_a_worked_example():
    """p = 0.01, 0.04, 0.03, 0.005: adjusted 0.03, 0.06, 0.06, 0.02 (Holm, 1979; R's p.adjust gives the same)."""
    judged = holm([with_p(p, mean=mean) for p, mean in ((0.01, 1), (0.04, 1), (0.03, 1), (0.005, -1))], negligible=0.01)
    assert [j.p for j in judged] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [j.verdict for j in judged] == ["helps", "not decided", "not decided", "harms"]
    # Holm stops at the first hypothesis that is not rejected, so both undecided ones are corrected for two.
    assert [1 - j.confidence for j in judged] == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])
    assert judged[0].low > 0 > judged[2].low


def test_an_undecided_interval_holds_zero():
    """None of the three is decided, so every interval must contain zero."""
    judged = holm([Estimate(mean, 0.4, 5) for mean in (1.2, 1.15, 1.12)], negligible=0.2)
    assert [j.verdict for j in judged] == ["not decided"] * 3
    assert all(j.low < 0 < j.high for j in judged)


def test_a_small_interval_around_zero_does_nothing():
    (judged,) = holm([Estimate(0.05, 0.02, 5)], negligible=0.2)
    assert judged.verdict == "does nothing"
    (judged,) = holm([Estimate(0.1, 0.01, 10)], negligible=0.2)
    assert judged.p < 0.05
    assert judged.verdict == "does nothing", "though it is not zero"


def test_what_does_nothing_is_corrected_too():
    """The last of three undecided ones is corrected for all three: 2.93 standard errors, not the 2.26 of one alone."""
    judged = holm([Estimate(mean, 0.08, 10) for mean in (0.1, 0.05, 0.0)], negligible=0.2)
    assert [j.verdict for j in judged] == ["not decided"] * 3
    assert judged[2].high == pytest.approx(0.08 * stats.t.isf(0.025 / 3, 9))


def test_smallest_decidable_effect():
    """Five seeds, paired standard deviation 0.5, one comparison: t(0.975, 4) * 0.5 / sqrt(5)."""
    deviation, effect, n = smallest_decidable([Estimate(1.0, 0.5 / 5**0.5, 5)])
    assert (deviation, effect, n) == (pytest.approx(0.5), pytest.approx(2.776 * 0.5 / 5**0.5, rel=1e-3), 5)
    assert smallest_decidable([estimate([0.5])]) is None


def test_f1_bound_holds_for_any_predictions_on_balanced_classes():
    generator = np.random.default_rng(0)
    for _ in range(200):
        confusion = generator.dirichlet(np.full(5, generator.uniform(0.05, 2)), size=5)
        recall = np.diag(confusion)
        f1 = 2 * recall / (1 + confusion.sum(0))
        assert not impossible(100 * recall.mean(), 100 * recall.mean(), 100 * f1.mean())
    assert impossible(82.03, 97.217, 94.7) == {"recall", "f1"}
    assert impossible(84.75, 96.416, 87.0) == {"recall"}
