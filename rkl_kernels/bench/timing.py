"""Clocks, rounds of contestants, medians, and the noise of a measurement."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

Run = Callable[[], object]
Timer = Callable[[Run, int], float]
"""``timer(run, calls)`` -> seconds a call, over ``calls`` calls in a row."""

LEAST_SAMPLE = 1e-3
"""The least seconds of a sample, so that waking the thread pool and reading the clock do not show in it."""
MOST_SAMPLES = 100


def cpu_timer(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def busy_timer(run: Run, calls: int) -> float:
    """CPU time of this process. On one thread, waiting for other processes does not lengthen it."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def cuda_timer(run: Run, calls: int) -> float:
    """Time between two events on the current stream. All calls are queued before the wait, so that launches overlap
    with the work."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def recorded(run: Run, pool: Any = None) -> Run:
    """The launches of ``run`` as a CUDA graph.

    A replay costs the host one call, so the clock sees the device's time. Otherwise it would see autograd's path to a
    gradient, which takes 0.1 to 0.2 ms, longer than most of the kernels that it launches. A network whose layers are
    queued ahead of the device does not wait for that path either. host.py measures the host's time for a call.

    Call this on a side stream, since only a side stream can be recorded, and prepare ``run`` there. Recordings in one
    ``pool`` share memory, since nobody reads what they leave.

    Raises:
        RuntimeError: the launches cannot be recorded. Launched by the host instead, they would not compare with others.
    """
    graph = torch.cuda.CUDAGraph()
    run()  # what is made once, a compiled kernel or a library's workspace, is made before the recording
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def timer_for(device: str) -> Timer:
    return cuda_timer if device == "cuda" else cpu_timer


@dataclass(frozen=True)
class Timing:
    """Seconds a call.

    Attributes:
        seconds: the median of the samples.
        noise: how far that median may be off, as a share of it. Infinity for one sample, which does not tell.
        samples: how many there are.
    """

    seconds: float
    noise: float
    samples: int


def noise_to_json(noise: float) -> float | None:
    """The noise, or None where it is unknown: JSON has no infinity."""
    return noise if math.isfinite(noise) else None


def to_json(timing: Timing) -> dict[str, Any]:
    """The timing as plain values."""
    return vars(timing) | {"noise": noise_to_json(timing.noise)}


def from_json(data: Mapping[str, Any]) -> Timing:
    """The timing that :func:`to_json` wrote. Earlier records give the noise of a single sample as 0."""
    return Timing(**data) if data["samples"] > 1 else Timing(data["seconds"], math.inf, data["samples"])


def summarize(samples: list[float], fastest: bool = False) -> Timing:
    """The median and its standard error. Both are robust: one sample disturbed by another process moves neither.

    ``fastest`` takes the shortest sample instead, for a machine so busy that most samples are disturbed.
    """
    count, middle = len(samples), median(samples)
    chosen = min(samples) if fastest else middle
    if count < 2:
        return Timing(chosen, math.inf, count)
    # 1.4826 turns the median distance into a standard deviation, 1.2533 a mean's error into a median's.
    deviation = 1.4826 * median(abs(s - middle) for s in samples)
    # Both hold for many samples. Few samples lie closer to their own median than to the true one: of three, the middle
    # one is at distance 0. In simulated normal noise the error is 1.7 times as large at three samples, 1.27 at five.
    few = 1 + 0.88 / (max(count, 3) - 1.75)
    return Timing(chosen, few * 1.2533 * deviation / math.sqrt(count) / middle, count)


def interleave(
    contestants: Mapping[str, Run], timer: Timer, budget: float, *, least: int = 3, fastest: bool = False
) -> dict[str, Timing]:
    """Time the contestants in rounds for about ``budget`` seconds in all.

    Rounds, because a shared machine's speed drifts: what slows one contestant slows the others of the same round, and
    their ratios stay right. Each round has its own order, drawn from the same random numbers in every run. A contestant
    finds in the caches what the one before it left there, its own input or nothing, so none may always follow the same
    one. (In a fixed order, the first always came after the matrix product, and the next found its image in the caches:
    0.7 where 1.0 is right.)

    Each contestant has the same share of the time. A slow one takes ``least`` samples and sits out the later rounds.
    The first call of each does not count: it makes what is made once, and takes the memory that later calls find (four
    layers of 64 MiB: 390 ms, then 36). Where the second call takes more than the whole budget, it is the only sample.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    calls: dict[str, int] = {}
    for name, run in contestants.items():
        timer(run, 1)
        warm = timer(run, 1)
        calls[name] = max(1, math.ceil(LEAST_SAMPLE / max(warm, 1e-9)))
        if warm > budget:
            samples[name].append(warm)
    share = budget / max(len(contestants), 1)
    active = [name for name in contestants if not samples[name]]
    order = random.Random(0)
    while active:
        for name in order.sample(active, len(active)):
            samples[name].append(timer(contestants[name], calls[name]))
        active = [n for n in active if _goes_on(samples[n], calls[n], share, least)]
    return {name: summarize(times, fastest) for name, times in samples.items()}


def a_layer(times: Mapping[str, Timing], chains: Mapping[str, tuple[Run, int]]) -> dict[str, Timing]:
    """The times of chains, divided by the number of their layers."""
    return {name: replace(timing, seconds=timing.seconds / chains[name][1]) for name, timing in times.items()}


def _goes_on(samples: list[float], calls: int, share: float, least: int) -> bool:
    if len(samples) < least:
        return True
    return len(samples) < MOST_SAMPLES and sum(samples) * calls < share


def copier(moved: int, device: str) -> Run:
    """A plain copy that reads and writes ``moved`` bytes in all, on all of torch's threads."""
    source = torch.ones(max(moved // 2, 1), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def multiplier(dtype: torch.dtype, device: str) -> tuple[Run, int]:
    """A square matrix product large enough to run at the machine's rate, and its operations.

    On a CPU it is the fastest of several. In float32 torch links two libraries: on processors that are not Intel's, MKL
    keeps to AVX2, and oneDNN does not. In 16 bits a product in float32 may be faster, where the processor has no
    instructions for the type. (An Ice Lake's separable layers in bf16 seemed to run at 200% of the floor's speed.)
    """
    size = 4096 if device == "cuda" else 768
    types = {dtype} if device == "cuda" else {dtype, torch.float32}
    products = [run for one in types for run in _products(one, device, size)]
    fastest = min(products, key=lambda run: min(cpu_timer(run, 1) for _ in range(3)))
    return fastest, 2 * size**3


def _products(dtype: torch.dtype, device: str, size: int) -> list[Run]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    products: list[Run] = [lambda: torch.mm(a, b, out=out)]
    if device == "cpu" and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return products
