"""How many times faster published models are on this machine, fused for inference and converted for training.

    python -m benchmarks.model_speed [--only NAME] [--budget SECONDS] [--within SECONDS]
    python -m benchmarks.model_speed --again [--budget SECONDS]
    python -m benchmarks.model_speed --missing [--budget SECONDS] [--within SECONDS]

The models of docs/models.md, fp32, at the image size that each was published with. Ours and
PyTorch's run interleaved, each in both layouts, of which the better one counts. Glibc keeps freed memory for both, as
a training process has it. Rows are written as they come; what a run does not reach keeps the row that it had. A
second run, `--again`, is for the rows below LOW: it takes longer, and what it finds stands. `--missing` is for models
without a row.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import Model, ModelRow, measure_model, timm_model, torchvision_model
from rkl_kernels.allocator import keep_freed_memory
from rkl_kernels.bench.machine import machine, machine_line, slug
from rkl_kernels.bench.table import geometric_mean

BATCH = 2
LOW = 0.97
CRASHED = "the process ended while it ran"
"""What is written before a model runs, and stays where it ends the process: oneDNN crashes on some."""
BUILDERS = {"torchvision": torchvision_model, "timm": timm_model}


@dataclass(frozen=True)
class Speed:
    """One model: its image size, and how many times faster ours is, with the noise of that ratio as a share of it."""

    size: int
    inference: float
    inference_noise: float
    step: float
    step_noise: float
    again: bool = False

    def is_low(self) -> bool:
        return min(self.inference, self.step) < LOW


def image_size(model: nn.Module) -> int:
    """What the model was published with: timm says it, torchvision's take 224."""
    return int((getattr(model, "pretrained_cfg", None) and model.pretrained_cfg["input_size"][-1]) or 224)


def measure(name: str, build: Callable[[], nn.Module], budget: float) -> Speed:
    size = image_size(build())
    inference, step = measure_model(Model(name, build, BATCH, size), budget)
    return Speed(size, *ratio_and_noise(inference), *ratio_and_noise(step))


def ratio_and_noise(row: ModelRow) -> tuple[float, float]:
    """
    Raises:
        RuntimeError: a variant was rejected, so that there is no ratio.
    """
    ratio, ours, eager = row.ratio(), row.best("ours"), row.best("eager")
    if ratio is None or ours is None or eager is None:
        raise RuntimeError("; ".join(f"{variant}: {why}" for variant, why in row.rejected.items()))
    return ratio, math.hypot(row.times[ours].noise, row.times[eager].noise)


def page(facts: dict[str, Any], speeds: dict[str, Speed], failed: dict[str, str]) -> str:
    def mean(values: list[float]) -> str:
        return f"{geometric_mean(values):.2f}, lowest {min(values):.2f}"

    def spread(noises: list[float]) -> str:
        return f"{statistics.median(noises):.0%} in the middle, {max(noises):.0%} at most"

    noises = [noise for s in speeds.values() for noise in (s.inference_noise, s.step_noise)]
    lines = [
        "# Speed of models",
        "",
        f"{machine_line(facts)}. fp32, {BATCH} images of the size that each model was published with. Times",
        "PyTorch's better layout: `rk.fuse_for_inference` in inference, `rk.convert` in a training step (forward,",
        "cross-entropy, backward, SGD with momentum). The noise of a ratio stands behind it. Made by",
        "`python -m benchmarks.model_speed`.",
        "",
    ]
    if speeds:
        lines += [
            f"Rows below {LOW}, those with a star, were measured again, for longer, and the second figures stand,",
            "whatever they are (`--again`). Others were not, so that the means lean upwards by a share of the noise.",
            "",
            f"Geometric means over {len(speeds)} models: inference {mean([s.inference for s in speeds.values()])}; "
            f"training step {mean([s.step for s in speeds.values()])}. Noise of a ratio: {spread(noises)}.",
            "",
            "| model | size | inference | training step |",
            "|---|---|---|---|",
        ]
    for name, s in speeds.items():
        ratios = (
            f"{s.inference:.2f} ± {s.inference * s.inference_noise:.2f} | {s.step:.2f} ± {s.step * s.step_noise:.2f}"
        )
        lines.append(f"| {name}{' *' if s.again else ''} | {s.size} | {ratios} |")
    if failed:
        lines += ["", "Not run:", "", *(f"- {name}: {why}" for name, why in failed.items())]
    return "\n".join(lines) + "\n"


def models(matrix: Path) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names and builders of the rows of the matrix's page."""
    for library, name in re.findall(r"^\| (torchvision|timm) (\S+) \|", matrix.read_text(), re.MULTILINE):
        yield f"{library} {name}", BUILDERS[library](name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing; a step has 3 times that")
    parser.add_argument("--within", type=float, default=1200, help="seconds after which no other model is begun")
    parser.add_argument("--again", action="store_true", help=f"only models with a row below {LOW}, which is replaced")
    parser.add_argument("--missing", action="store_true", help="only models without a row")
    parser.add_argument("--out", type=Path, help="a folder for the record; by default benchmarks/results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    facts, start = machine(), time.perf_counter()
    folder: Path = options.out or Path("benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"{slug(facts)}-models.json"
    kept = json.loads(record.read_text()) if record.exists() else {"speeds": {}, "failed": {}}
    speeds = {name: Speed(**speed) for name, speed in kept["speeds"].items()}
    failed: dict[str, str] = kept["failed"]

    def save() -> None:
        plain = {name: vars(speed) for name, speed in speeds.items()}
        record.write_text(json.dumps({"machine": facts, "speeds": plain, "failed": failed}, indent=1) + "\n")
        record.with_suffix(".md").write_text(page(facts, speeds, failed))

    save()
    for name, build in models(Path("docs/models.md")):
        low = name in speeds and speeds[name].is_low()
        if options.only not in name or (options.again and not low) or (options.missing and name in speeds):
            continue
        if failed.get(name) == CRASHED and not options.only:
            continue
        if time.perf_counter() - start > options.within:
            break
        failed[name] = CRASHED
        save()
        try:
            torch.manual_seed(0)
            speeds[name] = replace(measure(name, build, options.budget), again=options.again)
            del failed[name]
        except Exception as problem:  # one model that fails must not cost the others their rows
            failed[name] = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
            print(name, failed[name], flush=True)
        save()


if __name__ == "__main__":
    main()
