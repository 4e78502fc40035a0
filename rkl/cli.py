"""The command line: ``rkl COMMAND`` or ``python -m rkl COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from .terminal import complain, device_named, interrupted, mistake, parse, show, unknown_command


def train(arguments: Sequence[str]) -> None:
    """Train a model by self-distillation."""
    from .train_options import read_options

    options = read_options(arguments)
    from .training import report  # late, since they take seconds: help and a wrong option need none of it
    from .training.train import train as run

    folder = run(options.settings, resume=options.resume)
    if folder is None:  # another process writes and prints
        return
    for table in report.rich_tables(report.read_metrics(folder)):
        show(table)
    print(f"report: {folder / 'report.md'}   plots: {folder / 'plots'}")


@dataclass(frozen=True)
class Evaluate:
    """Measure accuracy, macro recall, F1, NLL and ECE of every exit of a run's model, on the test images by default."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    checkpoint: str = "last"
    """Checkpoint to use: `last` or `best`."""
    split: str = "test"
    """Images to measure on: `test` or `val`."""
    early_exit: bool = False
    """Let each image leave at the first exit that is confident enough, with thresholds from the validation images."""
    target_accuracy: float | None = None
    """With --early-exit: accuracy to reach on the validation images; the deepest exit's by default."""
    target_macs: float | None = None
    """With --early-exit: largest mean multiply-accumulates of an image, as a share of the deepest exit's."""
    device: str | None = None
    """`cpu` or `cuda`; by default the GPU if there is one."""

    def __call__(self) -> None:
        from .training.checkpoint import open_run

        if self.split not in ("test", "val"):
            raise ValueError(f"split must be 'test' or 'val', got {self.split!r}")
        if self.early_exit and self.split != "test":
            raise ValueError(
                f"split must be 'test' with --early-exit, which takes its thresholds from 'val', got {self.split!r}; "
                "leave one of the two out"
            )
        for name in ("target_accuracy", "target_macs"):
            value = getattr(self, name)
            if value is not None and not self.early_exit:
                raise ValueError(f"{name} must go with --early-exit, got {value} without it")
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
        run = open_run(self.run, self.checkpoint, device_named(self.device))
        from .training import metrics, report  # late, since they take seconds: a wrong folder is refused first
        from .training.evaluation import collect
        from .training.images import data_of

        if self.early_exit:
            from .deploy import exit_report

            record = exit_report.evaluate_early_exit(run, self.target_accuracy, self.target_macs, self.checkpoint)
            images = f"the test images, epoch {record['epoch']}"
            title = f"{run.config.model} on {run.config.data}: early exit on {images}"
            show(report.rich_table(title, *exit_report.rows(record)))
            print(f"plot: {run.folder / 'plots' / 'early_exit.png'}")
            return
        data = data_of(run).to(run.device)
        split = getattr(data, self.split)
        if not len(split):
            raise ValueError(f"split must have images, got {self.split!r} of a run with val_fraction 0")
        exits, labels = collect(run.model, split, data, run.config)
        rows = report.exit_rows([metrics.exit_metrics(logits, labels) for logits in exits])
        images = f"{len(labels)} {self.split} images, epoch {run.facts['epoch']}"
        title = f"{run.config.model} on {run.config.data}: {images}"
        show(report.rich_table(title, ["", *report.EXIT_METRICS.values()], rows))


@dataclass(frozen=True)
class Predict:
    """Classify image files: print the five likeliest classes with probabilities, and the exit each image left at."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    checkpoint: str = "last"
    """Checkpoint to use: `last` or `best`."""
    confidence: float | None = None
    """An image leaves at the first exit whose top probability reaches this value, or at the deepest exit. The default
    is the thresholds of the last `rkl evaluate --early-exit` or, without one, the thresholds that keep the deepest
    exit's accuracy on the validation images. If neither was found for this checkpoint, no image leaves early."""
    device: str | None = None
    """`cpu` or `cuda`; by default the GPU if there is one."""

    def __call__(self) -> None:
        from .deploy.predict import predict, thresholds_of
        from .network.model import ResNetKL
        from .training.checkpoint import open_run

        if not self.images:
            raise ValueError("images must name at least one file, got none")
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence must be between 0 and 1, got {self.confidence}")
        run = open_run(self.run, self.checkpoint, device_named(self.device))
        thresholds = thresholds_of(run, self.checkpoint)
        if self.confidence is not None:
            if not isinstance(run.model, ResNetKL):
                raise ValueError(
                    f"confidence must go with a model of several exits, got {self.confidence} for {run.config.model}; "
                    "leave it out"
                )
            thresholds = [self.confidence] * len(run.model.exits)
        wrong = 0
        for path, answer in zip(self.images, predict(run, list(self.images), thresholds), strict=True):
            if isinstance(answer, ValueError):
                complain(answer)
                wrong += 1
                continue
            classes = ", ".join(f"{name} {probability:.1%}" for name, probability in answer.top)
            print(f"{path}: {classes} (left at exit {answer.exit} of {answer.exits})")
        if wrong:
            raise SystemExit(2)


@dataclass(frozen=True)
class Experiments:
    """Run one of the paper's tables, or one factor at a time, with paired seeds; goes on where it was stopped."""

    table: tyro.conf.Positional[str]
    """`table2`, `table3`, `table4`, `table5` or `factors`."""
    out: Path
    """Folder of the runs. Tables in one folder share the runs of the rows that they have in common."""
    data: str | None = None
    """Name of the data set; by default the paper's for the table."""
    data_root: Path | None = None
    """Folder of the data set's files; by default the usual folders are searched."""
    download: bool = False
    """Download missing files of the data set into data_root."""
    scale: str = "cpu"
    """Size of the runs: `smoke`, `cpu` or `full`."""
    seeds: int | None = None
    """Number of runs for each row; the scale's number by default."""
    rows: tuple[str, ...] | None = None
    """Rows to train now; all rows of the table by default."""
    jobs: int | None = None
    """Number of runs at once; by default one for each GPU or, without a GPU, one for each of PyTorch's threads."""
    config: Path | None = None
    """YAML file of settings that replace the scale's, for every row whose network has them."""

    def __call__(self) -> None:
        from .paper import experiments, tables

        overrides = experiments.read_overrides(self.config) if self.config else {}
        overrides |= {name: given for name in ("data_root", "download") if (given := getattr(self, name))}
        plan = experiments.experiment(self.table, self.scale, self.out, self.data, self.seeds, **overrides)
        experiments.run(plan, self.jobs, announce=print, only=self.rows)
        print(f"report: {tables.write(self.out)}")


@dataclass(frozen=True)
class Report:
    """Write the report of a run, or of a folder of experiments, from its records."""

    folder: tyro.conf.Positional[Path]
    """Folder of a run or of experiments."""

    def __call__(self) -> None:
        from .paper import tables
        from .training import report

        write = report.write_report if (self.folder / "config.yaml").exists() else tables.write
        print(f"report: {write(self.folder)}")


@dataclass(frozen=True)
class Info:
    """List the models, the data sets and the backends, or only the kinds that are asked for."""

    models: bool = False
    datasets: bool = False
    backends: bool = False

    def __call__(self) -> None:
        import rkl_kernels as rk

        from . import data
        from .network.build import model_names

        everything = not (self.models or self.datasets or self.backends)
        if self.models or everything:
            print("models:", *model_names())
        if self.datasets or everything:
            print("datasets:", *data.NAMES)
        if self.backends or everything:
            for name, status in rk.backends().items():
                print(f"{name}: {'yes' if status.available else 'no'} - {status.reason}")


@dataclass(frozen=True)
class Prune:
    """Cut a finished run's model to a share of its compute or to a latency, and train it further in a new folder."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path
    """Folder of the new run."""
    target_macs: float | None = None
    """Share of the multiply-accumulates to keep, for example 0.5."""
    target_latency_ms: float | None = None
    """Most milliseconds for 16 images on this machine; a cut that does not speed the model up is refused."""
    epochs: int = 5
    """Number of epochs to train after the cut."""
    checkpoint: str = "last"
    """Checkpoint to use: `last` or `best`."""
    device: str | None = None
    """Device for the cut: `cpu` or `cuda`; by default the GPU if there is one."""

    def __call__(self) -> None:
        from .deploy.prune import before_and_after, naming_the_way_on, prune_run
        from .training import report
        from .training.checkpoint import open_run

        run = open_run(self.run, self.checkpoint, device_named(self.device))
        report.read_metrics(self.run)  # raises for an unfinished run, which has no metrics
        with naming_the_way_on(self.out):
            if prune_run(run, self.out, self.target_macs, self.target_latency_ms, self.epochs) is None:
                return  # another process writes and prints
            show(report.rich_table("pruned", *before_and_after(run, self.out)))
        print(f"report: {self.out / 'report.md'}")


@dataclass(frozen=True)
class Export:
    """Write a run's deployed model as torch.export and ONNX files, each checked against the model."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    format: tuple[Literal["torch", "onnx"], ...] = ("torch", "onnx")
    """Format of the file: `torch`, `onnx` or both."""
    out: Path | None = None
    """Folder to write to; the run's folder by default."""
    checkpoint: str = "last"
    """Checkpoint to use: `last` or `best`."""
    device: str | None = None
    """Device that the torch.export file is for: `cpu` or `cuda`; by default the GPU if there is one."""

    def __call__(self) -> None:
        from .deploy.export import export
        from .training.checkpoint import open_run

        if not self.format:
            raise ValueError("format must be torch, onnx or both, got none")
        run = open_run(self.run, self.checkpoint, device_named(self.device))
        for name in dict.fromkeys(self.format):
            file, difference = export(run, name, self.out)
            print(f"{file}: outputs equal the model's to {difference:.1e}")


@dataclass(frozen=True)
class Bench:
    """Time one operator on one shape against every rival, or three operators in ten seconds, on this machine."""

    operator: tyro.conf.Positional[str | None] = None
    """`trelu`, `depthwise` or `separable`; `host` for the cost of a call on the host; without it, four lines."""
    shape: str = "32,128,56,56"
    """Shape N,C,H,W of the images."""
    kernel: int = 3
    kernel_width: int | None = None
    """Width of the filter, if it differs from the height --kernel."""
    stride: int = 1
    dilation: int = 1
    dtype: str = "fp32"
    """`fp32`, `bf16` or `fp16`."""
    layout: str | None = None
    """Memory format: `nchw` or `nhwc`; both by default."""
    direction: str = "forward"
    """`forward`, `backward`, `data` or `weight`."""
    device: str = "cpu"

    def __call__(self) -> None:
        from rkl_kernels import bench

        taken = {None: set(), "host": {"device"}, "trelu": {"shape", "dtype", "layout", "direction", "device"}}
        if self.operator in taken:
            given = [f.name for f in fields(self)[1:] if getattr(self, f.name) != f.default]
            odd = [name for name in given if name not in taken[self.operator]]
            if odd:
                also = "trelu, " if odd[0] in taken["trelu"] else ""
                raise ValueError(
                    f"operator must be {also}depthwise or separable with --{odd[0].replace('_', '-')}, "
                    f"got {self.operator or 'none'}; name one, or leave the option out"
                )
        if self.operator == "host":
            print(bench.host_report(self.device))
            return
        if self.operator is None:
            print("\n".join(bench.four_lines()))
            return
        try:
            shape = [int(size) for size in self.shape.split(",")]
        except ValueError:
            raise ValueError(f"shape must be four numbers N,C,H,W, got {self.shape!r}") from None
        options = {
            name: getattr(self, name)
            for name in ("kernel_width", "stride", "dilation", "dtype", "layout", "direction", "device")
        }
        print(bench.operator_report(self.operator, shape, self.kernel, **options))


def _dataclass_command(kind: type) -> Callable[[Sequence[str]], None]:
    def command(arguments: Sequence[str]) -> None:
        parse(kind, arguments, prog=f"rkl {kind.__name__.lower()}")()

    command.__doc__ = kind.__doc__
    return command


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "evaluate": _dataclass_command(Evaluate),
    "predict": _dataclass_command(Predict),
    "prune": _dataclass_command(Prune),
    "export": _dataclass_command(Export),
    "experiments": _dataclass_command(Experiments),
    "report": _dataclass_command(Report),
    "bench": _dataclass_command(Bench),
    "info": _dataclass_command(Info),
}


GROUPS = {
    "make a model": ("train", "prune"),
    "use a finished run": ("evaluate", "predict", "export", "report"),
    "the paper": ("experiments",),
    "this machine": ("bench", "info"),
}

EXAMPLES = """\
examples:
  rkl train --data digits --width 16 --epochs 10 --out runs/digits
  rkl train --data folder:my/images --out runs/mine                  (one folder of images for each class)
  rkl predict runs/mine photo.jpg another.png
  rkl train --resume --out runs/mine                                 (go on after an interruption)
  rkl experiments table5 --data digits --scale smoke --out runs/table5"""


def usage() -> str:
    lines = ["usage: rkl COMMAND ...   (rkl COMMAND --help: its options; --version; --debug shows tracebacks)"]
    for title, names in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<12} {(COMMANDS[name].__doc__ or '').splitlines()[0]}" for name in names]
    return "\n".join([*lines, "", EXAMPLES])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. A user's mistake ends in one line and exit code 2; with ``--debug``, in a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        import rkl_kernels

        print(f"rkl {rkl_kernels.__version__}")
        return
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise unknown_command(name, COMMANDS)
        COMMANDS[name](rest)
    except KeyboardInterrupt as stop:
        print(interrupted(name, stop), file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:  # what nobody foresaw is raised again below, with its traceback
        said = mistake(name, error)
        if debug or not said or isinstance(error, BrokenPipeError):  # the reader is gone: __main__ handles it
            raise
        complain(said)
        raise SystemExit(2) from None
