"""Training runs that end badly, each in its own process: the faults, and how the process ended."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port

from rkl import cli
from rkl.config import Config, from_plain, to_plain
from rkl.training import checkpoint, report
from rkl.training import train as trainer
from rkl.training.run_log import RunLog

Fault = Callable[[Config], None]
"""Sets up a fault in the run's process. It must be a function of this module, since it is pickled by name."""

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def writes(config: Config, each: Callable[[str], None]) -> None:
    """Call ``each`` before every change of the run's folder. TensorBoard's changes, made by a thread, are left out."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if (opened or event in CHANGES) and not isinstance(arguments[0], int):
            names = [os.fspath(name) for name in arguments[:2] if isinstance(name, str | os.PathLike)]
            if str(names[0]).startswith(str(config.out)) and "tensorboard" not in str(names[0]):
                each(f"{event} {' '.join(str(Path(name).name) for name in names)}")

    sys.addaudithook(hook)


def kill_at_write(number: int, config: Config, by: int = signal.SIGKILL) -> None:
    """Send the process a signal before the write of that number, counted from 0."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes its background jobs ignore SIGINT
    count = 0

    def each(_: str) -> None:
        nonlocal count
        count += 1
        if count == number + 1:
            os.kill(os.getpid(), by)

    writes(config, each)


def note_writes(file: str, config: Config) -> None:
    """No fault: note the names of all writes in ``file``."""
    notes = open(file, "a", buffering=1)  # noqa: SIM115
    writes(config, lambda name: print(name, file=notes))


def kill_in_tensors(number: int, config: Config) -> None:
    """Kill the process with half of the tensors' file of that number written, counted from 1."""
    whole, count = checkpoint.save_file, 0

    def half(tensors: dict[str, torch.Tensor], file: Path) -> None:
        nonlocal count
        whole(tensors, file)
        count += 1
        if count == number:
            os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = half


def kill_in_log(number: int, config: Config) -> None:
    """Kill the process with half of that epoch's line in the log written."""
    whole = RunLog.write

    def half(self: RunLog, row: dict[str, Any]) -> None:
        whole(self, row)
        if row["epoch"] == number:
            file = self.folder / "log.jsonl"
            last = file.read_bytes().splitlines()[-1]
            os.truncate(file, file.stat().st_size - len(last) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    RunLog.write = half  # type: ignore[method-assign]


def at_epoch(number: int, what: Callable[[], object]) -> None:
    """Call ``what`` when an epoch, counted from 1, is trained and nothing of it is saved yet."""
    train_epoch = trainer.train_epoch

    def then(*arguments: Any) -> dict[str, Any]:
        row = train_epoch(*arguments)
        if row["epoch"] == number:
            what()
        return row

    trainer.train_epoch = then


def small_files(number: int, limit: int, config: Config) -> None:
    """From an epoch on (0: from the start), writes fail where a file would get longer than ``limit`` bytes.

    As on a full disk, a write fails in its middle. Only the error's text differs.
    """
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    what = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, most))
    at_epoch(number, what) if number else what()


def without_rights(config: Config) -> None:
    """Run as a user who owns nothing. The data is read before."""
    data = trainer.load_data(config)
    trainer.load_data = lambda config: data
    if os.geteuid() == 0:
        os.setuid(65534)


def killed_in(number: int, config: Config) -> None:
    """Kill the process in that epoch."""
    at_epoch(number, lambda: os.kill(os.getpid(), signal.SIGKILL))


def interrupted_in(number: int, config: Config) -> None:
    """Press Ctrl-C in that epoch."""
    at_epoch(number, lambda: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes its background jobs ignore SIGINT


def of_two(rank: int, port: int, fault: Fault | None, config: Config) -> None:
    """Run as one process of two, with a fault or without."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
    if fault:
        fault(config)


def lost(plain: dict[str, Any], threads: int, sender: Any) -> None:
    """Stands in for an experiment's process, and kills itself."""
    os.kill(os.getpid(), signal.SIGKILL)


def _run(plain: dict[str, Any], resume: bool, fault: Fault | None, output: str) -> None:
    torch.set_num_threads(1)
    with open(output, "a", buffering=1) as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        config = from_plain(plain)
        if fault:
            fault(config)
        # The command's error messages without its parsing. Plots are left out: they take longer than all else here.
        cli.COMMANDS["train"] = lambda arguments: trainer.train(config, resume)
        report._plot_curves = report.plot_confusion = lambda *arguments: None
        cli.main(["train"])


def started(config: Config, resume: bool = False, fault: Fault | None = None, output: Path | str = os.devnull) -> Any:
    """Start `rkl train` in a process forked from a server that has done the imports and started no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["rkl.cli", "rkl.training.train", "sklearn.datasets"]
    )  # the server does not find this module, so it is not preloaded
    process = context.Process(target=_run, args=(to_plain(config), resume, fault, str(output)))
    process.start()
    return process


def exit_code(process: Any) -> int:
    """Wait for a run's process. Returns its exit code, or minus the number of the signal that killed it."""
    process.join(600)
    assert process.exitcode is not None, "the run did not end"
    return int(process.exitcode)


def ended(config: Config, resume: bool = False, fault: Fault | None = None, output: Path | str = os.devnull) -> int:
    """Run such a process to its end."""
    return exit_code(started(config, resume, fault, output))


def started_in_two(config: Config, folder: Path, *faults: Fault | None, resume: bool = False) -> list[Any]:
    """Start two such processes that train together, each with a fault or None. Process i writes into file i."""
    port = find_free_network_port()
    return [
        started(config, resume, partial(of_two, rank, port, fault), folder / f"output{rank}")
        for rank, fault in enumerate(faults)
    ]
