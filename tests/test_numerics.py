"""Errors against float64, beside PyTorch's own: what docs/numerics.md shows of the CPU."""

from __future__ import annotations

import pytest

from benchmarks.numerics import CASES, measure


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_pytorch(case):
    rows = list(measure("cpu", {case: CASES[case]}))
    worse = [row for row in rows if row["ours rms"] > 1.5 * row["PyTorch rms"]]
    assert not worse, "\n".join(map(str, worse))
