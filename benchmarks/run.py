"""Time chosen rows and print their table: ``python -m benchmarks.run --operator depthwise --only mnv1-112``."""

from __future__ import annotations

import argparse
import sys

import torch

from rkl_kernels.allocator import keep_freed_memory
from rkl_kernels.bench import LAYOUTS, RIVALS, contestants, runtimes
from rkl_kernels.bench.case import DIRECTIONS, DTYPES, OPERATORS, Case
from rkl_kernels.bench.machine import machine, machine_line
from rkl_kernels.bench.row import Row, measure
from rkl_kernels.bench.table import COLUMNS, cells, line, notes, summary

from .arguments import count, positive
from .shapes import Shape, select


def cases(
    shapes: list[Shape], operators: list[str], directions: list[str], dtypes: list[str], device: str
) -> list[Case]:
    """Every case that exists, shape by shape, so that one reference serves the types of a shape."""
    return [
        shape.case(operator, direction, dtype, device)
        for operator in operators
        for shape in shapes
        for direction in directions
        for dtype in dtypes
        if exists(shape, operator, direction)
    ]


def exists(shape: Shape, operator: str, direction: str) -> bool:
    """Whether there is such a case: not every shape has a pointwise step, and T-ReLU has only one gradient."""
    if operator == "separable":
        return shape.out_channels is not None
    return operator == "depthwise" or direction in ("forward", "backward")


def _choice(choices: tuple[str, ...]) -> dict[str, object]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(choices)}, got {name!r}")
        return names

    return {"type": parse, "metavar": ",".join(choices)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--operator", **_choice(OPERATORS), default=["depthwise"])
    parser.add_argument("--only", help="shapes, by the beginnings of their ids, separated by commas")
    parser.add_argument("--direction", **_choice(DIRECTIONS), default=["forward"])
    parser.add_argument("--dtype", **_choice(tuple(DTYPES)), default=["fp32"])
    parser.add_argument("--layout", **_choice(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--rivals", **_choice(RIVALS), default=["eager"])
    parser.add_argument("--budget", type=positive, default=1.5, help="seconds of timing a row")
    parser.add_argument("--threads", type=count, help="threads of every contestant")
    parser.add_argument("--faulting", action="store_true", help="ours and PyTorch again with glibc's default allocator")
    parser.add_argument(
        "--busy", action="store_true", help="one thread, CPU time, shortest samples: to look while the machine is busy"
    )
    options = parser.parse_args(arguments)
    if options.busy and (options.threads or 1) > 1:
        parser.error(f"--threads must be 1 with --busy, got {options.threads}: CPU time is the sum of all threads'")
    if options.threads or options.busy:
        torch.set_num_threads(options.threads or 1)
    keep_freed_memory()
    try:
        shapes = select(options.only)
    except ValueError as problem:
        parser.error(str(problem))
    chosen = cases(shapes, options.operator, options.direction, options.dtype, "cpu")
    if not chosen:
        parser.error(
            f"--operator and --direction must have rows, got {','.join(options.operator)} and "
            f"{','.join(options.direction)} for {options.only or 'all shapes'}; separable needs a shape "
            "with a pointwise step, trelu has forward and backward"
        )
    print(machine_line(machine()))
    print(line(COLUMNS), flush=True)
    rows: list[Row] = []
    for case in chosen:
        serving = [name for name in options.rivals if name not in runtimes.NAMES or runtimes.serves(case)]
        rivals = contestants(serving, options.layout)
        rows.append(measure(case, rivals, budget=options.budget, busy=options.busy, faulting=options.faulting))
        print(line(cells(rows[-1])), *notes(rows[-1]), sep="\n", flush=True)
    print(line(summary(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
