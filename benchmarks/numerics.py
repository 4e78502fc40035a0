"""Errors of results against float64, beside PyTorch's own: ``python -m benchmarks.numerics`` writes docs/numerics.md.

Each backend is measured in a separate process, since Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rkl_kernels as rk
from rkl.training.files import check_writable, write_text

from .arguments import writing

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/numerics.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {"fp32": 24, "bf16": 8, "fp16": 11}
BACKENDS = {"cpu": "CPU", "emulated": "CUDA C++, emulated", "triton": "Triton, interpreted"}

DRAWS = 4
"""How often a case's tensors are drawn. A bias has few values, so one draw would be too few."""

Row = dict[str, Any]


def _depthwise(kernel: int, stride: int = 1) -> tuple[Callable[..., Tensor], list[tuple[int, ...]]]:
    shapes = [(2, 32, 20, 20), (32, 1, kernel, kernel), (32,)]
    return lambda library, *t: library.depthwise_conv2d(*t, stride, kernel // 2), shapes


def _separable(inner: str | None, activation: str | None) -> tuple[Callable[..., Tensor], list[tuple[int, ...]]]:
    shapes = [(2, 32, 20, 20), (32, 1, 3, 3), (48, 32, 1, 1), (32,), (48,)]
    return lambda library, *t: library.separable_conv2d(*t, 1, 1, 1, inner, activation), shapes


CASES = {
    "T-ReLU": (lambda library, x: library.trelu(x), [(50_000,)]),
    "depthwise 3 x 3": _depthwise(3),
    "depthwise 3 x 3, stride 2": _depthwise(3, 2),
    "depthwise 7 x 7": _depthwise(7),
    "depthwise 13 x 13": _depthwise(13),
    "separable 3 x 3": _separable(None, None),
    "separable 3 x 3, T-ReLU twice": _separable("trelu", "trelu"),
    "separable 3 x 3, silu": _separable("silu", None),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
NAMES = {
    1: ["output", "gradient"],
    3: ["output", "image's gradient", "filter's gradient", "bias's gradient"],
    5: ["output", "image's gradient", "depthwise filter's gradient", "pointwise filter's gradient",
        "depthwise bias's gradient", "pointwise bias's gradient"],
}  # fmt: skip


def in_ulp(result: Tensor, exact: Tensor, bits: int) -> Tensor:
    """Errors in units of the last place of the exact value, or of the tensor's root mean square where the value is
    smaller. A sum that cancels has few digits, whoever computes it, and a few such sums would decide the mean."""
    size = exact.abs().clamp(min=float(exact.square().mean().sqrt()))
    return (result.double() - exact).abs() / torch.exp2(size.log2().floor() - (bits - 1))


def _run(function: Callable[..., Tensor], library: Any, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(library, *leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _results(
    backend: str, function: Callable[..., Tensor], shapes: list[tuple[int, ...]], layout: str, dtype: str, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Output and gradients, each as ours, PyTorch's and the exact one."""
    torch.manual_seed(seed)
    scales = [1.0, *((torch.Size(s[1:]).numel() or 1) ** -0.5 for s in shapes[1:])]
    tensors = [torch.randn(s).mul(scale).to(DTYPES[dtype]) for s, scale in zip(shapes, scales, strict=True)]
    if len(shapes) > 1:
        tensors[0] = tensors[0].contiguous(memory_format=LAYOUTS[layout])
    grad = torch.randn(function(rk.reference, *tensors).shape).to(DTYPES[dtype])
    exact = _run(function, rk.reference, [t.double() for t in tensors], grad.double())
    theirs = _run(function, rk.reference, tensors, grad)
    with served_by(backend):
        ours = _run(function, rk, tensors, grad)
    yield from zip(ours, theirs, exact, strict=True)


def measure(backend: str, cases: dict[str, Any] = CASES) -> Iterator[Row]:
    """A row for each result, case, type and layout: maximum and root mean square of the errors, ours and PyTorch's."""
    for case, (function, shapes) in cases.items():
        for layout in list(LAYOUTS)[: 1 if len(shapes) == 1 else None]:
            for dtype in DTYPES:
                draws = [list(_results(backend, function, shapes, layout, dtype, seed)) for seed in range(DRAWS)]
                for number, name in enumerate(NAMES[len(shapes)]):
                    row = {"case": case, "layout": layout, "dtype": dtype, "result": name}
                    for i, who in enumerate(("ours", "PyTorch")):
                        errors = torch.stack([in_ulp(d[number][i], d[number][2], BITS[dtype]) for d in draws])
                        row |= {f"{who} max": float(errors.max()), f"{who} rms": float(errors.square().mean().sqrt())}
                    yield row


@contextmanager
def served_by(backend: str) -> Iterator[None]:
    """The backend, for the calls in the block. The emulated and the interpreted one are the tests' own."""
    if backend != "emulated":
        with rk.use_backend(backend):
            yield
        return
    from emulation import build
    from emulation.conftest import Gpu
    from emulation.operators import Operators, serving

    gpu = Gpu(build.load("checked"), False)
    gpu.schedule()
    with serving(Operators(gpu)):
        yield


def _in_own_process(backend: str) -> list[Row]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.numerics", "--measure", backend]
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if backend == "triton" else {})
    return json.loads(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout)


def page(rows: dict[str, list[Row]]) -> str:
    """The page: a table for each type, a line for each result, with the worse of both layouts."""
    lines = [INTRODUCTION]
    for dtype in DTYPES:
        lines += [f"\n## {dtype}\n", f"| | {' | '.join(BACKENDS.values())} | PyTorch |", "|---|---|---|---|---|"]
        merged: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
        for backend, some in rows.items():
            for row in some:
                if row["dtype"] != dtype:
                    continue
                cells = merged.setdefault((row["case"], row["result"]), {})
                for column, who in ((backend, "ours"), ("PyTorch", "PyTorch")):
                    worst = cells.get(column, (0.0, 0.0))
                    cells[column] = max(worst[0], row[f"{who} max"]), max(worst[1], row[f"{who} rms"])
        for (case, result), cells in merged.items():
            texts = [f"{cells[c][0]:.2f}, {cells[c][1]:.3f}" for c in (*rows, "PyTorch")]
            lines.append(f"| {case}: {result} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Numbers

This page shows how far results are from float64, beside PyTorch's own. Each cell holds two errors: the largest, and the
root mean square.

Errors are in units of the last place (ulp) of the result's type. An ulp is that of the exact value, or of the tensor's
root mean square where the value is smaller. An exact result that is rounded once is off by at most 0.5.

Inputs are normal numbers, drawn four times. Images have 2 x 32 x 20 x 20 values, and T-ReLU gets 50,000. A cell is the
worse of NCHW and NHWC. PyTorch stands for its own operators on the CPU, in the same type. The emulated and the
interpreted kernels get their pointwise products from the CPU's library. `python -m benchmarks.numerics` writes this
page.

`tests/test_numerics.py` tests the CPU's kernels. Their root mean square may be 1.5 times PyTorch's, in every line and
layout. Two lines are at 1.58 and 1.54 times PyTorch's, and may be at 1.75: the outputs of 7 x 7 and 13 x 13 filters on
NHWC images in fp32. There we add all products of an output one after the other in one register, and PyTorch adds them
in several. To do the same would cost us the registers that make these kernels fast.

Each single result is held to a bound that follows from the arithmetic (`tests/oracle.py`).
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numerics", description=__doc__)
    parser.add_argument("--measure", choices=BACKENDS, help="only print one backend's rows, as JSON")
    args = parser.parse_args()
    if args.measure:
        sys.path.insert(0, str(ROOT / "tests"))
        if args.measure == "triton":
            sys.path.insert(0, str(ROOT / "tests/triton"))
            import interpreter  # noqa: F401  corrects the interpreter's arithmetic
        print(json.dumps(list(measure(args.measure))))
        return
    with writing(parser):
        check_writable(PAGE)
        write_text(PAGE, page({backend: _in_own_process(backend) for backend in BACKENDS}))


if __name__ == "__main__":
    main()
