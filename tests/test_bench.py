"""The benchmark harness computes rounds, ratios and noise rightly, and rejects a wrong rival before timing."""

from __future__ import annotations

import json
import math
import platform
import random
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median, stdev
from typing import Any

import pytest
import torch
from bench_rows import TINY, row_of

import rkl_kernels as rk
from benchmarks import suite
from benchmarks.run import main as run_main
from benchmarks.shapes import SHAPES, select
from rkl_kernels import bench
from rkl_kernels.allocator import keep_freed_memory
from rkl_kernels.bench import Case, contestants, faulting, measure, runtimes
from rkl_kernels.bench import row as row_module
from rkl_kernels.bench.faulting import process, time_faulting
from rkl_kernels.bench.rivals import Rival, eager, error, inputs, layers, ours, reference
from rkl_kernels.bench.row import from_json, to_json
from rkl_kernels.bench.table import table
from rkl_kernels.bench.timing import interleave, summarize


def test_rounds_and_a_slow_one_sits_out() -> None:
    seconds = {"a": 1 / 64, "b": 1 / 64, "slow": 0.25, "slower": 5.0}
    order: list[str] = []

    def timer(run, calls):  # type: ignore[no-untyped-def]
        run()
        return seconds[order[-1]]

    times = interleave({name: lambda name=name: order.append(name) for name in seconds}, timer, budget=0.5)
    assert [sorted(order[i : i + 3]) for i in (8, 11, 14)] == [["a", "b", "slow"]] * 3
    assert order.count("slower") == 2, "where a call takes more than the whole budget, one is enough, after the first"
    assert times["slow"].samples == 3
    assert times["a"].samples == times["b"].samples == 8, "each has its share of the time, 1/8 s"
    assert {name: timing.seconds for name, timing in times.items()} == seconds


@pytest.mark.parametrize("cold", [4.0, 0.25])
def test_nothing_is_told_by_a_first_call(cold: float) -> None:
    """A first call pays for memory that later calls reuse. It once gave 97 ms a layer where 9 is right, and made single
    calls the samples of whatever took 1 ms or more just once."""
    first, told = iter([cold]), []

    def timer(run: Callable[[], object], calls: int) -> float:
        told.append(calls)
        return next(first, 2**-14)

    times = interleave({"a": lambda: None}, timer, budget=0.5)
    assert times["a"].seconds == 2**-14
    assert times["a"].samples > 3
    assert set(told[2:]) == {17}, "of 61 us, to make 1 ms"


def test_every_contestant_follows_every_other() -> None:
    """What one leaves in the caches helps or hinders the next. In fixed turns that would always be the same one."""
    order: list[str] = []

    def timer(run, calls):  # type: ignore[no-untyped-def]
        run()
        return 1e-3

    interleave({name: lambda name=name: order.append(name) for name in "abcd"}, timer, budget=0.4)
    follows = Counter(pair for pair in pairwise(order[8:]) if len(set(pair)) == 2)
    assert len(order) == 408
    assert len(follows) == 12
    assert min(follows.values()) > 15, "about 26 each"


def test_what_a_call_gives_is_read_by_what_comes_next() -> None:
    seen: list[torch.Tensor] = []

    def run(image: torch.Tensor = torch.ones(1)) -> tuple[torch.Tensor]:  # noqa: B008
        seen.append(image)
        return (image + 1,)

    chain, count = layers(TINY, run)
    chain()
    assert TINY.repeats
    assert [int(image) for image in seen] == [1, 2, 3, 4]
    assert count == 4
    results: list[torch.Tensor] = []
    for case in (replace(TINY, stride=2), replace(TINY, direction="backward"), replace(TINY, padding=0)):
        assert not case.repeats
        chain, count = layers(case, lambda: results.append(torch.tensor([-1.0])) or results[-1:])
        chain()
        assert count == 1
        assert results[-1] == 0, "an in-place ReLU went over the result"
    assert replace(TINY, operator="separable", out_channels=8).repeats
    assert not replace(TINY, operator="separable", out_channels=5).repeats


def test_times_are_a_layers_also_with_the_allocator_as_it_comes() -> None:
    row = measure(TINY, contestants(layouts=("nhwc",)), budget=0.02, faulting=True)
    assert set(row.faulting) == {"ours nhwc", "eager nhwc"}
    assert row.same_layout_faulting("nhwc") is not None
    assert from_json(json.loads(json.dumps(to_json(row)))) == row


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("name", ["ours", "eager"])
def test_who_is_timed_with_the_allocator_as_it_comes(name: str, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by whose operator is called. There are at least three samples; on a busy machine the shortest counts."""
    called: set[str] = set()

    def spied(library: Any, of: str) -> None:
        right = library.depthwise_conv2d
        monkeypatch.setattr(library, "depthwise_conv2d", lambda *a, **k: called.add(of) or right(*a, **k))

    spied(rk, "ours")
    spied(rk.reference, "eager")
    settings: list[dict[str, bool]] = []
    monkeypatch.setattr(faulting, "interleave", lambda *a, **k: settings.append(k) or interleave(*a, **k))
    times = faulting._timed(TINY, [f"{name} nhwc"], 0.02, busy, torch.get_num_threads())
    assert called == {name}
    assert times[f"{name} nhwc"].samples >= 3
    assert settings == [{"fastest": busy}]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator may keep what glibc's gives back")
def test_with_the_allocator_as_it_comes_large_tensors_fault() -> None:
    """They do even if this process keeps freed memory. Once it does, no setting of this process makes them fault."""
    keep_freed_memory()
    case = replace(TINY, batch=1, channels=16, height=1024, width=1024)
    faults = [process().submit(resource.getrusage, resource.RUSAGE_SELF).result().ru_minflt]
    timed = time_faulting(case, ["ours nhwc"], budget=1e-9, busy=False)
    faults.append(process().submit(resource.getrusage, resource.RUSAGE_SELF).result().ru_minflt)
    assert set(timed) == {"ours nhwc"}
    pages = 4 * case.channels * case.height * case.width // resource.getpagesize()
    assert faults[1] - faults[0] > 7 * pages, "two calls of four layers, the output of each"


def test_one_disturbed_sample_moves_neither_median_nor_noise() -> None:
    quiet, disturbed = summarize([1.0, 1.1, 0.9, 1.0, 1.05]), summarize([1.0, 1.1, 0.9, 1.0, 100.0])
    assert disturbed.seconds == quiet.seconds == 1.0
    assert disturbed.noise < 2.1 * quiet.noise < 0.2
    assert summarize([3.0, 1.0, 2.0], fastest=True).seconds == 1.0


@pytest.mark.parametrize("count", [3, 4, 5, 7, 15, 30])
def test_the_noise_of_few_samples_is_not_too_small(count: int) -> None:
    """The median of the reported noise is the standard deviation of the medians, of which there are many here."""
    draw = random.Random(count)
    timings = [summarize([draw.gauss(1, 0.01) for _ in range(count)]) for _ in range(10_000)]
    told = median(timing.noise for timing in timings)
    true = stdev(timing.seconds for timing in timings)
    assert 0.97 < told / true < 1.1


def test_one_sample_says_nothing_about_its_noise() -> None:
    one = summarize([2.0])
    assert (one.seconds, one.noise, one.samples) == (2.0, math.inf, 1)
    row = replace(row_of(ours_nchw=1.0, eager_nchw=1.0), times={"ours nchw": one})
    assert table([row]).endswith(" ?")


def test_ratios_are_to_the_best_rival_and_to_the_floor() -> None:
    row = row_of(ours_nchw=4.0, ours_nhwc=2.0, eager_nchw=12.0, eager_nhwc=5.0, openvino_nchw=3.0)
    assert row.same_layout("nchw") == 3.0
    assert row.same_layout("nhwc") == 2.5
    assert row.over_best() == 1.5, "our better layout against the best of all rivals"
    assert row.of_floor() == 0.5
    assert row.of_floor("ours nchw") == 0.25
    slow_arithmetic = replace(row, matrix_rate=row.case.least_operations / 1.6)
    assert slow_arithmetic.floor == 1.6, "the longer of bytes and operations"
    assert row_of(ours_nchw=1.0).over_best() is None
    forced = replace(row, times=row.times | row_of(**{"ours-triton_nhwc": 1.0}).times)
    assert forced.over_best() == 1.5, "what a call gets counts, not a backend that is faster when it is forced"
    assert forced.of_floor() == 0.5
    assert "3.00" in table([row])
    assert "1.50" in table([row])


def test_the_noise_is_ours_and_that_of_what_the_floor_is() -> None:
    row = replace(row_of(ours_nchw=4.0, noise=0.03), matrix_noise=0.04)
    assert row.noise() == pytest.approx(math.hypot(0.03, 0.03)), "a copy is the floor"
    slow_arithmetic = replace(row, matrix_rate=row.case.least_operations / 1.6)
    assert slow_arithmetic.noise() == pytest.approx(0.05), "the product is the floor"
    assert replace(slow_arithmetic, matrix_noise=math.inf).noise() == math.inf
    for one in (slow_arithmetic, replace(row, matrix_noise=math.inf)):
        assert from_json(json.loads(json.dumps(to_json(one), allow_nan=False))) == one
    earlier = to_json(slow_arithmetic)
    del earlier["matrix_noise"]
    assert from_json(earlier).noise() == pytest.approx(math.hypot(0.03, 0.03)), "the copy's stands in for it"


def test_the_matrix_rate_is_measured_with_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {row_module.COPY: summarize([1.0]), row_module.MATRIX: replace(summarize([2.0]), noise=0.25)}
    monkeypatch.setattr(row_module, "interleave", lambda runs, *_, **__: {n: told.get(n, told["copy"]) for n in runs})
    assert measure(TINY, [ours("nchw")]).matrix_noise == 0.25


def test_work_is_counted_as_the_planner_counts_it() -> None:
    x, dw, pw = torch.zeros(2, 8, 9, 7), torch.zeros(8, 1, 3, 3), torch.zeros(5, 8, 1, 1)
    for operator, arguments, out in (("depthwise", (x, dw), 0), ("separable", (x, dw, pw), 5)):
        case = replace(TINY, operator=operator, out_channels=out, stride=2)
        told = rk.explain(f"{operator}_conv2d", *arguments, stride=2, padding=1)
        assert (case.bytes, case.operations) == (told.bytes, told.operations)
    assert replace(TINY, dtype="bf16", direction="backward").bytes == 2 * (3 * x.numel() + 2 * dw.numel())
    assert replace(TINY, direction="backward").operations == 2 * TINY.operations


@pytest.mark.parametrize("direction", ["forward", "backward", "data", "weight"])
@pytest.mark.parametrize("operator", ["trelu", "depthwise", "separable"])
def test_every_contestant_is_right_in_every_direction(operator: str, direction: str) -> None:
    if operator == "trelu" and direction in ("data", "weight"):
        with pytest.raises(ValueError, match="direction must be forward or backward for trelu, got"):
            replace(TINY, operator=operator, direction=direction)
        return
    case = replace(TINY, operator=operator, direction=direction, out_channels=5, dtype="bf16")
    row = measure(case, contestants(), budget=0.02)
    assert set(row.times) == {"ours nchw", "ours nhwc", "eager nchw", "eager nhwc"}
    assert not row.rejected


@pytest.mark.parametrize("name", runtimes.NAMES)
@pytest.mark.parametrize("operator", ["trelu", "depthwise", "separable"])
def test_the_runtimes_compute_the_same(name: str, operator: str) -> None:
    pytest.importorskip(name, reason=f"{name}, a rival of the extra [bench], is not installed")
    activation = "trelu" if operator == "separable" else None
    case = replace(TINY, operator=operator, out_channels=5, stride=2, dilation=2, padding=2, activation=activation)
    assert error(runtimes.rival(name).prepare(case, "cpu")(), reference(case)) < 1e-5
    row = measure(replace(case, direction="backward"), [runtimes.rival(name)], budget=0.01)
    assert "serves forward in fp32" in row.rejected[f"{name} nchw"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda y: y * 1.01, "wrong: off by 0.01"),
        (lambda y: y * float("nan"), "wrong: off by inf"),
        (lambda y: y[:1], "wrong: off by inf"),
        (lambda y: y.missing, "fails: AttributeError"),
    ],
)
def test_a_wrong_rival_is_rejected_before_it_is_timed(spoil, reason: str) -> None:  # type: ignore[no-untyped-def]
    calls = []

    def prepare(case: Case, device: str):  # type: ignore[no-untyped-def]
        right = eager("nchw").prepare(case, device)

        def run():  # type: ignore[no-untyped-def]
            calls.append(1)
            return tuple(spoil(y) for y in right())

        return run

    row = measure(TINY, [ours("nchw"), Rival("wrong", "nchw", prepare)], budget=0.02)
    assert len(calls) == 1, "the check calls it once, the clock never"
    assert set(row.times) == {"ours nchw"}
    assert row.rejected["wrong nchw"].startswith(reason)
    assert reason in table([row])


def test_what_must_be_zero_is_right_where_it_is_zero() -> None:
    """The one tap meets the padding alone. A share of the largest value would be 0 / 0."""
    case = Case("depthwise", 1, 2, 1, 1, kernel=1, stride=3, padding=1)
    assert not reference(case)[0].any()
    row = measure(case, contestants(layouts=("nchw",)), budget=0.01)
    assert set(row.times) == {"ours nchw", "eager nchw"}
    assert not row.rejected
    (zero,) = reference(case)
    for wrong in (1e-30, math.nan):
        assert error((zero + wrong,), (zero,)) == math.inf


def test_one_reference_serves_every_type() -> None:
    given = inputs(replace(TINY, dtype="bf16"))
    assert torch.equal(given.x, given.x.bfloat16().float())
    assert given is inputs(replace(TINY, direction="backward", name="other"))


def test_cases_and_reports_name_what_is_wrong_with_an_argument() -> None:
    for changes, message in (
        ({"operator": "conv"}, "operator must be one of trelu, depthwise, separable, got 'conv'"),
        ({"dtype": "int8"}, "dtype must be one of fp32, bf16, fp16, got 'int8'"),
        ({"kernel_width": 0}, "kernel_width must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"operator": "separable"}, "out_channels must be at least 1, got 0"),
        ({"kernel": 31}, "kernel must fit into the padded image, got kernel 31"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **changes)
    with pytest.raises(ValueError, match="shape must be N,C,H,W, got 1,2"):
        bench.operator_report("depthwise", (1, 2))
    for huge in ((10**5, 10**5, 10**3, 10**3), (10**25, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"shape must fit into the \d+ GB of memory, got 1000"):
            bench.operator_report("trelu", huge)
    with pytest.raises(ValueError, match="seconds must be a positive number, got -1"):
        bench.operator_report("depthwise", (1, 2, 8, 8), seconds=-1)
    with pytest.raises(ValueError, match="layout must be one of nchw, nhwc, got 'chwn'"):
        bench.operator_report("depthwise", (1, 2, 8, 8), layout="chwn")
    with pytest.raises(ValueError, match="device must be cpu, or cuda where torch sees a GPU, got 'tpu'"):
        bench.operator_report("depthwise", (1, 2, 8, 8), device="tpu")
    with pytest.raises(ValueError, match="--only must name shapes, got 'vgg'; there are mnv1-112"):
        select("mnv1,vgg")


def test_the_shapes_are_unique_and_fit() -> None:
    assert len({shape.id for shape in SHAPES}) == len(SHAPES)
    for case in suite.cases():
        assert case.out_height >= 1
        assert case.bytes > 0


def test_one_operator_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert run_main(["--only", "rkl-4-k3s2", "--budget", "0.02", "--operator", "trelu"]) == 0
    assert "trelu forward fp32 rkl-4-k3s2" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        run_main(["--only", "vgg"])
    assert exit.value.code == 2
    assert torch.get_num_threads() == threads


def test_four_lines() -> None:
    lines = bench.four_lines(seconds=0.1, batch=1)
    assert len(lines) == 4
    for line in lines[1:]:
        assert line.count("x PyTorch") == 2


def test_an_error_without_words_is_told() -> None:
    def prepare(case: Case, device: str) -> Callable[..., object]:
        raise AssertionError

    row = measure(TINY, [Rival("silent", "nchw", prepare)], budget=0.01)
    assert row.rejected == {"silent nchw": "fails: AssertionError: without a message"}


def test_what_cannot_be_recorded_is_not_timed_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(run: Callable[[], object], pool: object) -> Callable[[], object]:
        if run is bad:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        if run is silent:
            raise RuntimeError
        return run

    def good() -> None: ...
    def bad() -> None: ...
    def silent() -> None: ...

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(row_module, "recorded", recorded)
    rejected: dict[str, str] = {}
    given = {"ours nhwc": good, "eager nhwc": bad, "eager nchw": silent}
    assert row_module._recorded(given, rejected) == {"ours nhwc": good}
    assert rejected == {
        "eager nhwc": "cannot be recorded: operation not permitted",
        "eager nchw": "cannot be recorded: without a message",
    }
