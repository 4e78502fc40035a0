"""Errors against float64 beside PyTorch's own, as docs/numerics.md shows them for the CPU."""

from __future__ import annotations

import pytest

from benchmarks.numerics import CASES, INTRODUCTION, PAGE, measure

# docs/numerics.md explains both in its introduction: NHWC in fp32 has a chain of 49 or 169 sums in a register.
LIMITS = {("depthwise 7 x 7", "NHWC", "fp32", "output"): 1.75, ("depthwise 13 x 13", "NHWC", "fp32", "output"): 1.75}


def test_the_committed_page_has_the_introduction_of_the_program():
    assert PAGE.read_text().startswith(INTRODUCTION)


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_pytorch(case):
    rows = list(measure("cpu", {case: CASES[case]}))

    def limit(row):
        return LIMITS.get(tuple(row[key] for key in ("case", "layout", "dtype", "result")), 1.5)

    worse = [row for row in rows if row["ours rms"] > limit(row) * row["PyTorch rms"]]
    assert not worse, "\n".join(map(str, worse))
