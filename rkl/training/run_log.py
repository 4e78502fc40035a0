"""A run's folder during training (configuration, one JSON line for each epoch, TensorBoard events) and progress bar."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ..config import Config, is_other_run, read_plain, read_yaml, to_plain
from .evaluation import device_name, precision_on
from .files import AGAIN, RunError, UnwritableError, held, read_lines, resuming, to_json, write_text

FIRST_CHECKPOINT = re.compile(r"\.?((best|last)-000[01]\.safetensors|(best|last)\.json)(\.partial)?")
"""Files of a checkpoint that may exist when a run stopped before its first whole epoch."""

LAST_FILES = ("metrics.json", "report.md", "plots/curves.png", "plots/confusion.png")
"""The files that a run writes after its last epoch."""

EVENTS = re.compile(r"events\.out\.tfevents.*")


class RunLog:
    """The folder of one run. The constructor checks that the folder can be written and that no other files are in the
    way; nothing is written before :meth:`opened`. The files of a run without a whole epoch may be overwritten. Other
    files with the names of a run's files may not. ``takes_resume``: whether the command has --resume.

    Raises:
        RunError: the folder cannot be written, holds a run already (without ``resume``), or a run of other settings.
    """

    def __init__(self, config: Config, resume: bool, takes_resume: bool = True) -> None:
        self.config, self.folder, self.writing = config, config.out, False
        self.resume, self.takes_resume = resume, takes_resume
        self.checkpoints, self.tensorboard = config.out / "checkpoints", config.out / "tensorboard"
        self.file = config.out / "config.yaml"
        self.found = self._last()
        if self.has_checkpoint and not resume:
            remedy = "add --resume to go on with it" if takes_resume else "give another folder"
            raise RunError(f"{config.out}: out must be a new folder, got one with a run in it; {remedy}")
        if not self.has_checkpoint and (name := next(self._not_left_over(), None)):
            raise RunError(
                f"{config.out}: out must be a new folder, got one with {name}, which no run without a whole epoch "
                "leaves; give another folder"
            )
        if self.has_checkpoint:
            then, now = to_plain(read_yaml(self.file)), to_plain(config)
            for key in now:
                if is_other_run(key, then[key], now[key]):
                    raise RunError(
                        f"{self.file}: a resumed run must keep its settings, got {key} {now[key]!r} for {then[key]!r}"
                    )
        there = next(path for path in (config.out.absolute(), *config.out.absolute().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise RunError(f"{config.out}: out must be a writable folder, got {there}, which is none")

    @property
    def has_checkpoint(self) -> bool:
        return (self.checkpoints / "last.json").exists()

    def _last(self) -> bytes:
        """The present record of the last checkpoint; empty if there is none."""
        return (self.checkpoints / "last.json").read_bytes() if self.has_checkpoint else b""

    @property
    def has_epoch(self) -> bool:
        """Whether there is a whole epoch, which stays after a failure."""
        return self.has_checkpoint and bool(self.rows())

    @property
    def remedy(self) -> str:
        """What an error tells the user to do after a failure."""
        if self.resume or not self.has_epoch:
            return AGAIN
        return "add --resume to go on" if self.takes_resume else f"go on by {resuming(self.folder)}"

    def _not_left_over(self) -> Iterator[str]:
        """Files in the folder that have names of a run's files, but do not come from a run without a whole epoch."""
        yield from (file for file in LAST_FILES if (self.folder / file).exists())
        if self.file.exists() and not _is_whole(self.file):
            yield self.file.name
        try:
            epochs = len(self.rows())
        except RunError:
            epochs = 2
        if epochs > 1:
            yield "log.jsonl"
        for folder, name in ((self.checkpoints, FIRST_CHECKPOINT), (self.tensorboard, EVENTS)):
            for path in sorted(folder.glob("*")):
                if not name.fullmatch(path.name):
                    yield f"{folder.name}/{path.name}"

    def _written(self) -> set[Path]:
        """The files in the folder that have names of a run's files."""
        inside = [path for folder in (self.tensorboard, self.checkpoints) for path in folder.rglob("*")]
        return {path for path in (*inside, self.file, self.folder / "log.jsonl") if path.is_file()}

    @contextmanager
    def opened(self, epoch: int, writing: bool) -> Iterator[None]:
        """Write the configuration, and drop the lines of epochs after the checkpoint, which will be trained again. If
        the block fails before the first whole epoch, its files are removed: a corrected command finds the folder free.

        Raises:
            RunError: another process trains in the folder, or has done so since the constructor's checks.
        """
        self.writing = writing
        folders = self.tensorboard, self.checkpoints, self.folder, *self.folder.parents
        new = [path for path in folders if not path.exists()]
        with held(self.folder) if writing else nullcontext():
            if writing and self._last() != self.found:
                raise RunError(f"{self.folder}: out must be as it was found, got another process's epochs; {AGAIN}")
            before = self._written()
            try:
                if writing:
                    self._begin(epoch)
                yield
            except ValueError as error:
                if writing and not self.has_epoch:
                    self._remove(before, new)
                if isinstance(error, UnwritableError):
                    raise UnwritableError(error.path, error.error, self.remedy) from error
                raise

    def _begin(self, epoch: int) -> None:
        """Write what :meth:`opened` writes."""
        kept = [row for row in self.rows() if row["epoch"] <= epoch]
        write_text(self.file, yaml.safe_dump(to_plain(self.config), sort_keys=False))
        write_text(self.folder / "log.jsonl", "".join(to_json(row) + "\n" for row in kept))
        try:
            self.events = SummaryWriter(str(self.tensorboard), purge_step=epoch + 1)
        except OSError as error:
            raise UnwritableError(self.tensorboard, error) from error

    def _remove(self, before: set[Path], new: list[Path]) -> None:
        """Remove the files that are not in ``before``, and the folders in ``new`` that are empty."""
        if hasattr(self, "events"):
            self.events.close()
        for path in self._written() - before:
            path.unlink(missing_ok=True)
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the epochs so far."""
        return read_lines(self.folder / "log.jsonl")

    def warn_of_precision(self, device: torch.device) -> None:
        """Say so if a resumed run goes on in another precision than its last epoch had. The default depends on the
        device."""
        now, last = precision_on(self.config, device), self.rows()[-1] if self.has_epoch else {}
        then = last.get("precision", now)
        if now != then:
            before = f"trained in {then} on {last['device']} so far"
            print(f"rkl: {self.folder}: {before}, goes on in {now} on {device_name(device)}", file=sys.stderr)

    def write(self, row: dict[str, Any]) -> None:
        """Append the row of one epoch."""
        file = self.folder / "log.jsonl"
        try:
            with file.open("a") as lines:
                lines.write(to_json(row) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
            self._write_events(row)
        except OSError as error:
            raise UnwritableError(file, error) from error

    def _write_events(self, row: dict[str, Any]) -> None:
        self.events.add_scalar("lr", row["lr"], row["epoch"])
        for name, value in row["losses"].items():
            self.events.add_scalar(f"loss/{name}", value, row["epoch"])
        for number, exit_metrics in enumerate(row["val"], 1):
            for name, value in exit_metrics.items():
                self.events.add_scalar(f"val_{name}/exit{number}", value, row["epoch"])
        self.events.flush()

    @contextmanager
    def progress(self, epochs: int, done: int) -> Iterator[TrainingProgress]:
        """A progress bar over the epochs, with the latest validation accuracy."""
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not self.writing) as bar:
            yield TrainingProgress(bar, epochs, done)
        if self.writing:
            self.events.close()


def _is_whole(file: Path) -> bool:
    """Whether a file has every setting, as a configuration written by a run has."""
    try:
        return set(read_plain(file)) == {field.name for field in fields(Config)}
    except ValueError:
        return False


class TrainingProgress:
    """Updates the progress bar for the training loop."""

    def __init__(self, bar: Progress, epochs: int, done: int) -> None:
        self.bar, self.epochs, self.accuracy = bar, epochs, ""
        self.task = bar.add_task(f"epoch {done}/{epochs}", total=epochs, completed=done)

    def step(self, epoch: int, step: int, steps: int) -> None:
        self.bar.update(
            self.task,
            completed=epoch + (step + 1) / steps,
            description=f"epoch {epoch + 1}/{self.epochs}{self.accuracy}",
        )

    def epoch(self, val: list[dict[str, float]]) -> None:
        self.accuracy = f"  val {val[-1]['accuracy']:.2%}" if val else ""

    def cut(self, record: dict[str, Any]) -> None:
        before, after = record["before"], record["after"]
        accuracy = (
            f", val {before['val_accuracy']:.2%} -> {after['val_accuracy']:.2%}" if "val_accuracy" in after else ""
        )
        self.bar.console.print(
            f"cut: parameters {before['parameters']:,} -> {after['parameters']:,}, "
            f"MACs {before['macs']:,} -> {after['macs']:,}, "
            f"{before['latency_ms']:.1f} -> {after['latency_ms']:.1f} ms{accuracy}",
            markup=False,
            soft_wrap=True,
        )
