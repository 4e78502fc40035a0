"""A run's folder while it trains: configuration, one JSON line an epoch, TensorBoard events, the progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from .checkpoint import RunError, write_text
from .config import Config, read_yaml, to_plain

MAY_CHANGE = {"out", "data_root", "download", "devices"}
"""Fields that a resumed run may set anew: they say where, not what."""


class RunLog:
    """The folder of one run. Checks at once that it can be written and that nothing of another run is in the way.

    Raises:
        RunError: the folder cannot be written, holds a run already (without ``resume``), or one of other settings.
    """

    def __init__(self, config: Config, resume: bool, writing: bool = True) -> None:
        self.folder, self.writing = config.out, writing
        self.checkpoints = config.out / "checkpoints"
        file = config.out / "config.yaml"
        if file.exists() and not resume:
            raise RunError(
                f"{config.out}: out must be a new folder, got one with a run in it; add --resume to go on with it"
            )
        if file.exists():
            then, now = to_plain(read_yaml(file)), to_plain(config)
            for key in now:
                if then[key] != now[key] and key not in MAY_CHANGE:
                    raise RunError(
                        f"{file}: a resumed run must keep its settings, got {key} {now[key]!r} for {then[key]!r}"
                    )
        if writing:
            try:
                write_text(file, yaml.safe_dump(to_plain(config), sort_keys=False))
            except OSError as error:
                raise RunError(f"{config.out}: out must be a writable folder, got: {error.strerror}") from error

    @property
    def has_checkpoint(self) -> bool:
        return (self.checkpoints / "last.json").exists()

    def rows(self) -> list[dict[str, Any]]:
        """The epochs so far."""
        file = self.folder / "log.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def start(self, epoch: int) -> None:
        """Drop the lines of epochs after the checkpoint: they will be trained again."""
        if self.writing:
            kept = [row for row in self.rows() if row["epoch"] <= epoch]
            write_text(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
            self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=epoch + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append one epoch."""
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.events.add_scalar("lr", row["lr"], row["epoch"])
        for name, value in row["losses"].items():
            self.events.add_scalar(f"loss/{name}", value, row["epoch"])
        for number, exit_metrics in enumerate(row["val"], 1):
            for name, value in exit_metrics.items():
                self.events.add_scalar(f"val_{name}/exit{number}", value, row["epoch"])
        self.events.flush()

    @contextmanager
    def progress(self, epochs: int, done: int) -> Iterator[TrainingProgress]:
        """A bar over the epochs, with the latest validation accuracy."""
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not self.writing) as bar:
            yield TrainingProgress(bar, epochs, done)
        if self.writing:
            self.events.close()


class TrainingProgress:
    """What the loop tells the bar."""

    def __init__(self, bar: Progress, epochs: int, done: int) -> None:
        self.bar, self.epochs, self.accuracy = bar, epochs, ""
        self.task = bar.add_task(f"epoch {done}/{epochs}", total=epochs, completed=done)

    def step(self, epoch: int, step: int, steps: int) -> None:
        self.bar.update(
            self.task,
            completed=epoch + (step + 1) / steps,
            description=f"epoch {epoch + 1}/{self.epochs}{self.accuracy}",
        )

    def epoch(self, accuracy: float) -> None:
        self.accuracy = f"  val {accuracy:.2%}"

    def cut(self, before: dict[str, float], after: dict[str, float]) -> None:
        self.bar.console.print(
            f"cut: parameters {before['parameters']:,} -> {after['parameters']:,}, "
            f"MACs {before['macs']:,} -> {after['macs']:,}, "
            f"{before['latency_ms']:.1f} -> {after['latency_ms']:.1f} ms, "
            f"val {before['val_accuracy']:.2%} -> {after['val_accuracy']:.2%}"
        )
