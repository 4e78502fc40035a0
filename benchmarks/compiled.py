"""Published models under torch.compile: with this package's operators and with PyTorch's, each as it comes, too.

    python -m benchmarks.compiled [--budget SECONDS]
    python -m benchmarks.compiled --only NAME --out FOLDER [--budget SECONDS]

The models of benchmarks/models.py in fp32 and channels_last: a fused copy in inference, a converted model in a training
step. All are timed in rounds, after the first calls, which compile. A ratio is that of the faster of ours to the faster
of PyTorch's, compiled or not. Writes the machine's record into benchmarks/results/compiled/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkl.training.files import check_writable, write_text
from rkl_kernels.allocator import keep_freed_memory
from rkl_kernels.bench.machine import machine, machine_line, slug
from rkl_kernels.bench.timing import cpu_timer, interleave
from rkl_kernels.errors import told

from .arguments import check_only, positive, writing
from .models import (
    DIRECTIONS,
    GRADIENT_TOLERANCE,
    MODELS,
    TOLERANCE,
    Model,
    ModelRow,
    Prepared,
    to_json,
    wrong_logits,
    wrong_step,
)
from .suite import RESULTS

PUBLISHED = MODELS[1:]
"""Those that PyTorch's layers make without this package."""
VARIANTS = ("eager", "eager compiled", "ours", "ours compiled")


class Compiled(Prepared):
    """A variant whose model is compiled where the name says so, at its first call."""

    def __init__(self, model: Model, variant: str, start: nn.Module) -> None:
        name, *compiled = variant.split()
        super().__init__(model, f"{name} nhwc", start)
        if compiled:
            self.net, self.served, self.backend = torch.compile(self.net), torch.compile(self.served), nullcontext


def measure(model: Model, budget: float) -> list[ModelRow]:
    """Inference and training step of the variants that compute what "eager" does."""
    start, rows = model.build(), []
    for direction in DIRECTIONS:
        torch._dynamo.reset()
        row = ModelRow(model.name, direction, model.batch, model.size)
        prepared = {variant: Compiled(model, variant, start) for variant in VARIANTS}
        runs = {variant: one.call(direction) for variant, one in prepared.items()}
        is_step = direction == "training step"
        # Or compiled code would draw other numbers, and drop other values.
        with torch._inductor.config.patch(fallback_random=True):
            wanted = prepared["eager"].first_step() if is_step else prepared["eager"].inference()
            for variant in VARIANTS[1:]:
                one = prepared[variant]
                if is_step:
                    wrong = wrong_step(one.first_step(), wanted, TOLERANCE, GRADIENT_TOLERANCE)
                else:
                    wrong = wrong_logits(one.inference(), wanted)
                if wrong:
                    row.rejected[variant] = wrong
                    del runs[variant]
            row.times = interleave(runs, cpu_timer, budget * (3 if is_step else 1))
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: ModelRow) -> str:
    """The row of a table."""
    times = (f"{row.times[v].seconds * 1e3:.1f}" if v in row.times else "rejected" for v in VARIANTS)
    return f"| {row.model} | {row.direction} | {' | '.join(times)} | {row.ratio() or 0:.2f} |"


def page(facts: dict[str, Any], rows: Iterable[ModelRow], failed: dict[str, str]) -> str:
    rows = list(rows)
    lines = [
        "# Models under torch.compile",
        "",
        f"{machine_line(facts)}. fp32, channels_last; milliseconds a call. Ours: `rk.fuse_for_inference` in inference,",
        "`rk.convert` in a training step (forward, cross-entropy, backward, SGD with momentum). Ratio: the faster of",
        "PyTorch's two times over the faster of ours. Made by `python -m benchmarks.compiled`.",
        "",
        f"| model | direction | {' | '.join(VARIANTS)} | ratio |",
        "|" + "---|" * (len(VARIANTS) + 3),
        *map(line, rows),
    ]
    reasons = {f"{row.model}, {row.direction}, {v}": why for row in rows for v, why in row.rejected.items()} | failed
    return "\n".join([*lines, *([""] if reasons else []), *(f"- {of}: {why}" for of, why in reasons.items())]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--budget", type=positive, default=5.0, help="seconds of timing; a step gets 3 times that")
    parser.add_argument("--out", type=Path, default=None, help="folder for the record; --only must have one")
    options = parser.parse_args(arguments)
    if options.only:
        if not options.out:
            parser.error(f"--only must have --out, or some models would replace all, got {options.only!r} alone")
        check_only(parser, options.only, (model.name for model in PUBLISHED))
    keep_freed_memory()
    facts, rows, failed = machine(), [], {}
    file = (options.out or RESULTS / "compiled") / f"{slug(facts)}.json"
    with writing(parser):
        check_writable(file, file.with_suffix(".md"))
        for model in (model for model in PUBLISHED if options.only in model.name):
            try:
                rows += measure(model, options.budget)
            except Exception as problem:  # a model that fails must not cost the others their rows
                failed[model.name] = f"fails: {told(problem)}"
        plain = {"machine": facts, "rows": [to_json(row) for row in rows], "failed": failed}
        write_text(file, json.dumps(plain, indent=1) + "\n")
        write_text(file.with_suffix(".md"), page(facts, rows, failed))
    print(f"written: {file}, {file.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
