"""How many times faster published models are on this machine, fused for inference and converted for training.

    python -m benchmarks.model_speed [--only NAME] [--budget SECONDS] [--within SECONDS]
    python -m benchmarks.model_speed --again [--budget SECONDS]
    python -m benchmarks.model_speed --missing [--budget SECONDS] [--within SECONDS]

The models are those of docs/models.md, in fp32, at the image size that each was published with. Ours and PyTorch's are
timed in rounds, each in both layouts, of which the better one counts. glibc keeps freed memory for both, as in a
training process. Rows are written as they come. A model that a run does not reach keeps its earlier row, and a model
that fails loses it. A second run with `--again` measures the models with a figure below LOW once more, and its figures
stand, so give it a larger `--budget`. `--missing` measures the models without a row.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkl.training.files import write_text
from rkl_kernels.allocator import keep_freed_memory
from rkl_kernels.bench.machine import machine, machine_line, other_machine, slug
from rkl_kernels.bench.table import geometric_mean
from rkl_kernels.errors import told

from .arguments import check_only, positive, writing
from .models import Model, ModelRow, measure_model, timm_model, torchvision_model
from .suite import RESULTS

MATRIX = Path(__file__).parents[1] / "docs/models.md"
BATCH = 2
LOW = 0.97
CRASHED = "the process ended while it ran"
"""Written before a model runs. It stays if the model ends the process: oneDNN crashes on some."""
BUILDERS = {"torchvision": torchvision_model, "timm": timm_model}


@dataclass(frozen=True)
class Speed:
    """One model: its image size, how many times faster ours is, and the noise of that ratio, as a share of it.

    Attributes:
        again: whether it was measured a second time, as its first figures were low.
        budget: seconds of timing in inference. None in earlier records, which do not tell.
        note: how the gradients of the training step were compared, if not by the usual bound.
    """

    size: int
    inference: float
    inference_noise: float
    step: float
    step_noise: float
    again: bool = False
    budget: float | None = None
    note: str = ""

    def is_low(self) -> bool:
        """Whether it is to be measured again. Second figures stand: the best of several attempts would be too high."""
        return not self.again and min(self.inference, self.step) < LOW


def speed_to_json(speed: Speed) -> dict[str, Any]:
    """The speed as plain values. An unknown noise is None, since JSON has no infinity."""
    return {name: None if value == math.inf else value for name, value in vars(speed).items()}


def speed_from_json(data: dict[str, Any]) -> Speed:
    return Speed(**{name: math.inf if value is None else value for name, value in data.items()})


def image_size(model: nn.Module) -> int:
    """The size that the model was published with: timm tells it, torchvision's models take 224."""
    return int((getattr(model, "pretrained_cfg", None) and model.pretrained_cfg["input_size"][-1]) or 224)


def measure(name: str, build: Callable[[], nn.Module], budget: float) -> Speed:
    size = image_size(build())
    inference, step = measure_model(Model(name, build, BATCH, size), budget)
    return Speed(size, *ratio_and_noise(inference), *ratio_and_noise(step), note=step.note)


def ratio_and_noise(row: ModelRow) -> tuple[float, float]:
    """The row's ratio and its noise.

    Raises:
        RuntimeError: a variant was rejected. It may be the faster layout, so what is left gives no ratio.
    """
    ratio, ours, eager = row.ratio(), row.best("ours"), row.best("eager")
    if row.rejected or ratio is None or ours is None or eager is None:
        raise RuntimeError("; ".join(f"{variant}: {why}" for variant, why in row.rejected.items()))
    return ratio, math.hypot(row.times[ours].noise, row.times[eager].noise)


def page(facts: dict[str, Any], speeds: dict[str, Speed], failed: dict[str, str]) -> str:
    def mean(values: list[float]) -> str:
        return f"{geometric_mean(values):.2f}, lowest {min(values):.2f}"

    def share(noise: float) -> str:
        return f"{noise:.0%}" if math.isfinite(noise) else "unknown"

    def spread(noises: list[float]) -> str:
        return f"{share(statistics.median(noises))} in the middle, {share(max(noises))} at most"

    def with_noise(ratio: float, noise: float) -> str:
        """The ratio and its noise, or "?" for a single sample, which does not tell."""
        return f"{ratio:.2f} ± {ratio * noise:.2f}" if math.isfinite(noise) else f"{ratio:.2f} ± ?"

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
            *measured_again(speeds.values()),
            "",
            f"Geometric means over {len(speeds)} models: inference {mean([s.inference for s in speeds.values()])}; "
            f"training step {mean([s.step for s in speeds.values()])}. Noise of a ratio: {spread(noises)}.",
            "",
            "| model | size | inference | training step |",
            "|---|---|---|---|",
        ]
    for name, s in speeds.items():
        ratios = f"{with_noise(s.inference, s.inference_noise)} | {with_noise(s.step, s.step_noise)}"
        lines.append(f"| {name}{' *' if s.again else ''} | {s.size} | {ratios} |")
    notes = [f"- {name}: {s.note}" for name, s in speeds.items() if s.note]
    if notes:
        lines += [
            "",
            "Training steps of which the gradients were compared by a wider bound, or not at all:",
            "",
            *notes,
        ]
    if failed:
        lines += ["", "Not run:", "", *(f"- {name}: {why}" for name, why in failed.items())]
    return "\n".join(lines) + "\n"


def measured_again(speeds: Collection[Speed]) -> list[str]:
    """What the page says of second measurements, and for how long rows were timed."""

    def seconds(rows: list[Speed]) -> str:
        budgets = sorted({s.budget for s in rows}, key=lambda budget: budget or 0)
        return " or ".join("not recorded" if budget is None else f"{budget:g}" for budget in budgets)

    first, second = ([s for s in speeds if s.again == again] for again in (False, True))
    groups = {"rows without a star": first, "rows with a star": second}
    timed = "; ".join(f"{seconds(rows)} ({name})" for name, rows in groups.items() if rows)
    told = [f"Seconds of timing in inference: {timed}. A training step had three times as many."]
    if not second:
        return [*told, "No row was measured a second time (`--again`)."]
    return [
        *told,
        f"Rows with a star were below {LOW} at first. They were measured again (`--again`), and the second figures",
        "stand, whatever they are. The others were not, so the means lean upwards by a share of the noise.",
    ]


def models(matrix: Path) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names and builders of the models in the matrix's page."""
    for library, name in re.findall(r"^\| (torchvision|timm) (\S+) \|", matrix.read_text(), re.MULTILINE):
        yield f"{library} {name}", BUILDERS[library](name)


class Record:
    """The file of all models' rows and the page beside it, written as rows come."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the file exists, and is no such record, or one of another machine or other versions.
        """
        self.path, self.facts = path, facts
        try:
            kept = json.loads(path.read_text()) if path.exists() else {"machine": facts, "speeds": {}, "failed": {}}
            self.speeds = {name: speed_from_json(speed) for name, speed in kept["speeds"].items()}
            self.failed: dict[str, str] = dict(kept["failed"])
            other = other_machine(kept["machine"], facts)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
            raise ValueError(
                f"must be a folder whose record is one of models, got {path}: {told(problem)}"
            ) from problem
        if other:
            raise ValueError(
                f"must be a folder whose record is of this machine and its versions, got {path}: {other}, and here it "
                f"is {machine_line(facts)}"
            )

    def save(self) -> None:
        standing = {name: speed for name, speed in self.speeds.items() if name not in self.failed}
        plain = {name: speed_to_json(speed) for name, speed in standing.items()}
        text = json.dumps({"machine": self.facts, "speeds": plain, "failed": self.failed}, indent=1)
        write_text(self.path, text + "\n")
        write_text(self.path.with_suffix(".md"), page(self.facts, standing, self.failed))

    def add(self, name: str, work: Callable[[], Speed]) -> None:
        """Add the model's row, or why there is none; a row from before goes then. If interrupted, the model keeps what
        it had."""
        before = self.failed.get(name)
        self.failed[name] = CRASHED
        self.save()
        try:
            torch.manual_seed(0)
            self.speeds[name] = work()
            del self.failed[name]
        except Exception as problem:  # a model that fails must not cost the others their rows
            self.failed[name] = told(problem)
            self.speeds.pop(name, None)
            print(name, self.failed[name], flush=True)
        except KeyboardInterrupt:
            del self.failed[name]
            if before is not None:
                self.failed[name] = before
            raise
        finally:
            self.save()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--budget", type=positive, default=1.0, help="seconds of timing; a step gets 3 times that")
    parser.add_argument("--within", type=positive, default=1200, help="seconds after which no further model is begun")
    parser.add_argument("--again", action="store_true", help=f"only models first below {LOW}; replaces their rows")
    parser.add_argument("--missing", action="store_true", help="only models without a row")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the record")
    options = parser.parse_args(arguments)
    if not MATRIX.is_file():
        parser.error(f"needs the page of models, got none at {MATRIX}; run it from a checkout of the source tree")
    if options.only:
        check_only(parser, options.only, (name for name, _ in models(MATRIX)))
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    facts, start = machine(), time.perf_counter()
    try:
        record = Record(options.out / f"{slug(facts)}-models.json", facts)
    except ValueError as problem:
        parser.error(f"--out {problem}; give an empty folder")
    with writing(parser):
        record.save()
        for name, build in models(MATRIX):
            low = name in record.speeds and record.speeds[name].is_low()
            if options.only not in name or (options.again and not low) or (options.missing and name in record.speeds):
                continue
            if record.failed.get(name) == CRASHED and not options.only:
                continue
            if time.perf_counter() - start > options.within:
                break
            record.add(
                name,
                lambda name=name, build=build: replace(
                    measure(name, build, options.budget), again=options.again, budget=options.budget
                ),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
