"""One row of a table: a case measured on every contestant, with the floor measured in the same rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import first_line, told
from . import timing
from .case import Case
from .faulting import time_faulting
from .rivals import TOLERANCES, TYPES, Rival, error, layers, reference
from .timing import (
    Timing,
    a_layer,
    busy_timer,
    copier,
    interleave,
    multiplier,
    recorded,
    timer_for,
)

COPY, MATRIX = "copy", "matrix product"
OURS = "ours"


@dataclass
class Row:
    """What was measured for a case.

    Attributes:
        times: seconds a layer of every contestant whose results were right, by its id ("ours nhwc", "eager nchw").
        faulting: the same for this package and PyTorch with the default allocator, where large outputs cost page
            faults. Empty unless asked for.
        rejected: the contestants that were not timed, and why.
        copy: a plain copy of the case's unavoidable bytes.
        matrix_rate: operations a second of a large matrix product in the case's type.
        matrix_noise: how far that rate may be off, as a share.
    """

    case: Case
    copy: Timing
    matrix_rate: float
    times: dict[str, Timing] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    faulting: dict[str, Timing] = field(default_factory=dict)
    matrix_noise: float = 0.0

    @property
    def floor(self) -> float:
        """The least seconds for the work: its bytes at copy speed or its least operations at the matrix rate,
        whichever is longer.

        A copy on a CPU reads each line of its output before it writes it. A kernel that writes past the caches may take
        two thirds of the copy's time.
        """
        return max(self.copy.seconds, self.case.least_operations / self.matrix_rate)

    @property
    def floor_noise(self) -> float:
        """How far the floor may be off, as a share: the noise of the longer of its two times."""
        return self.copy.noise if self.floor == self.copy.seconds else self.matrix_noise

    def best(self, mine: bool) -> str | None:
        """Our faster layout, or the fastest of the rivals. None where there is none. "ours-triton" and others with a
        backend forced on them count on neither side: they are not what a call of this package gets."""
        names = [name for name in self.times if (name.split()[0] == OURS if mine else not name.startswith(OURS))]
        return min(names, key=lambda name: self.times[name].seconds, default=None)

    def ratio(self, rival: str | None, mine: str | None) -> float | None:
        """How many times ``mine`` is faster than ``rival``. None where either was not timed."""
        if rival not in self.times or mine not in self.times:
            return None
        return self.times[rival].seconds / self.times[mine].seconds

    def same_layout(self, layout: str) -> float | None:
        """How many times we are faster than PyTorch eager in the same layout."""
        return self.ratio(f"eager {layout}", f"{OURS} {layout}")

    def same_layout_faulting(self, layout: str) -> float | None:
        """The same with the default allocator."""
        return Row(self.case, self.copy, self.matrix_rate, self.faulting).same_layout(layout)

    def over_best(self) -> float | None:
        """How many times our better layout is faster than the best rival in any layout."""
        return self.ratio(self.best(mine=False), self.best(mine=True))

    def of_floor(self, name: str | None = None) -> float | None:
        """The share of the floor's speed that a contestant reaches. Without ``name``, that of our better layout."""
        name = name or self.best(mine=True)
        return self.floor / self.times[name].seconds if name in self.times else None

    def noise(self) -> float | None:
        """How far :meth:`of_floor` may be off, as a share."""
        name = self.best(mine=True)
        return math.hypot(self.times[name].noise, self.floor_noise) if name else None


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """A block in which all of PyTorch's libraries multiply fp32 values in TF32, or none does. By default PyTorch's
    convolutions use TF32 where the GPU has it, and then exact arithmetic cannot be compared with theirs."""
    settings: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [one.allow_tf32 for one in settings]
    try:
        for one in settings:
            one.allow_tf32 = tf32
        yield
    finally:
        for one, value in zip(settings, before, strict=True):
            one.allow_tf32 = value


def measure(
    case: Case,
    rivals: Iterable[Rival],
    device: str = "cpu",
    budget: float = 1.5,
    busy: bool = False,
    faulting: bool = False,
) -> Row:
    """Check every contestant's results against the float64 reference, then time those that are right.

    The contestants are timed in rounds (:func:`interleave`), each on the work that :func:`layers` makes.

    Args:
        budget: seconds of timing for all contestants together.
        faulting: time this package and PyTorch again on the CPU, in half as much time, in a process with the default
            allocator.
        busy: take CPU time and shortest samples instead of wall time and medians, to look at a kernel on one thread
            while the machine does other work. Do not keep such figures.
    """
    with products(case.tf32), torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
        return _measure(case, rivals, device, budget, busy, faulting)


def _measure(case: Case, rivals: Iterable[Rival], device: str, budget: float, busy: bool, faulting: bool) -> Row:
    runs: dict[str, Callable[[], Any]] = {}
    rejected: dict[str, str] = {}
    for rival in rivals:
        if device == "cuda":
            torch.cuda.empty_cache()  # frees the float64 copies: the largest shapes need the room
        try:
            run = rival.prepare(case, device)
            wrong = error(run(), reference(case, device))
        except Exception as problem:  # a rival that cannot do a case must not end the others' run
            rejected[rival.id] = f"fails: {told(problem)}"
            continue
        if wrong > TOLERANCES[case.precision]:
            rejected[rival.id] = f"wrong: off by {wrong:.2g} of the largest value"
        else:
            runs[rival.id] = run
    product, operations = multiplier(TYPES[case.dtype], device)
    timer = busy_timer if busy else timer_for(device)
    chains = {name: layers(case, run, device) for name, run in runs.items()}
    contestants = {name: chain for name, (chain, _) in chains.items()}
    if device == "cuda":
        contestants = _recorded(contestants, rejected)
    times = interleave(contestants | {COPY: copier(case.bytes, device), MATRIX: product}, timer, budget, fastest=busy)
    copy, matrix = times.pop(COPY), times.pop(MATRIX)
    row = Row(case, copy, operations / matrix.seconds, a_layer(times, chains), rejected, matrix_noise=matrix.noise)
    if faulting and device == "cpu":
        row.faulting = time_faulting(case, contestants, budget / 2, busy)
    return row


def _recorded(contestants: dict[str, Callable[[], Any]], rejected: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """The contestants whose launches can be recorded. The others are rejected."""
    pool = torch.cuda.graph_pool_handle()
    found = {}
    for name, chain in contestants.items():
        try:
            found[name] = recorded(chain, pool)
        except RuntimeError as problem:
            rejected[name] = f"cannot be recorded: {first_line(problem)}"
    return found


def to_json(row: Row) -> dict[str, Any]:
    """Everything that was measured, as plain values."""
    return {
        "id": row.case.id,
        "case": dict(vars(row.case)),
        "bytes": row.case.bytes,
        "operations": row.case.operations,
        "copy": timing.to_json(row.copy),
        "matrix_rate": row.matrix_rate,
        "matrix_noise": timing.noise_to_json(row.matrix_noise),
        "times": {name: timing.to_json(one) for name, one in row.times.items()},
        "faulting": {name: timing.to_json(one) for name, one in row.faulting.items()},
        "rejected": row.rejected,
    }


def from_json(data: Mapping[str, Any]) -> Row:
    """The row that :func:`to_json` wrote.

    Earlier records have no times with the default allocator. They have no noise of the matrix rate either: the copy's
    noise, from the same rounds, stands in for it.
    """
    times, faulting = (
        {name: timing.from_json(one) for name, one in data.get(key, {}).items()} for key in ("times", "faulting")
    )
    copy = timing.from_json(data["copy"])
    noise = data.get("matrix_noise", copy.noise)
    matrix_noise = math.inf if noise is None else noise
    return Row(Case(**data["case"]), copy, data["matrix_rate"], times, dict(data["rejected"]), faulting, matrix_noise)
