"""Single cases under pytest-benchmark: ``pytest benchmarks/bench_operators.py -k "depthwise and mnv1-112 and fp32"``.

Each contestant runs to its end before the next begins, with pytest-benchmark's own statistics and comparisons
(``--benchmark-compare``). Take ratios from suite.py, which times the contestants in rounds, and says why.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rkl_kernels.allocator import keep_freed_memory
from rkl_kernels.bench import Case, contestants
from rkl_kernels.bench.rivals import TOLERANCES, Rival, error, reference
from rkl_kernels.bench.timing import cpu_timer

from .suite import cases, rivals_of

SECONDS = 1.0
"""Seconds of timing a contestant."""


def _parameters() -> Iterator[object]:
    for case in cases():
        for rival in contestants(rivals_of(case)):
            yield pytest.param(case, rival, id=f"{case.id} {rival.id}".replace(" ", "-"))


@pytest.mark.parametrize(("case", "rival"), _parameters())
def test_operator(benchmark, case: Case, rival: Rival) -> None:  # type: ignore[no-untyped-def]
    keep_freed_memory()
    run = rival.prepare(case, "cpu")
    wrong = error(run(), reference(case))
    if wrong > TOLERANCES[case.dtype]:
        pytest.skip(f"{rival.id} is off by {wrong:.2g} of the largest value: a wrong result is not timed")
    seconds = cpu_timer(run, 1)
    benchmark.group = case.id
    benchmark.pedantic(run, rounds=max(3, min(50, int(SECONDS / seconds))), warmup_rounds=1)
