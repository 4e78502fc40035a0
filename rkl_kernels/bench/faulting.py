"""Times contestants again in a process with the default allocator.

This needs a separate process. Once an allocator has kept freed memory, large tensors find room in its heap and cost no
page faults, whatever its settings are from then on.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import torch

from .case import Case
from .rivals import eager, layers, ours
from .timing import Timing, a_layer, busy_timer, cpu_timer, interleave

MAKERS = {"ours": ours, "eager": eager}


def time_faulting(case: Case, names: Iterable[str], budget: float, busy: bool) -> dict[str, Timing]:
    """Seconds a layer on the CPU. Of the ids in ``names``, only this package's and PyTorch's are timed."""
    mine = [name for name in names if name.split()[0] in MAKERS]
    return process().submit(_timed, case, mine, budget, busy, torch.get_num_threads()).result()


@cache
def process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"))


def _timed(case: Case, names: list[str], budget: float, busy: bool, threads: int) -> dict[str, Timing]:
    torch.set_num_threads(threads)
    chains = {}
    for name in names:
        maker, layout = name.split()
        chains[name] = layers(case, MAKERS[maker](layout).prepare(case, "cpu"), "cpu")
    timer = busy_timer if busy else cpu_timer
    runs = {name: chain for name, (chain, _) in chains.items()}
    return a_layer(interleave(runs, timer, budget, fastest=busy), chains)
