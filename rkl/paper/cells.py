"""The processes in which the cells of an experiment are trained."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any

import torch

from rkl_kernels.errors import told

from ..config import Config, from_plain, to_plain
from ..training.files import UnwritableError
from ..training.train import train
from .gradients import record_gradients

Cell = tuple[str, int]
"""A row's name and a seed."""


def train_all(configs: dict[Cell, Config], jobs: int | None, announce: Callable[[str], None]) -> list[str]:
    """Train cells, ``jobs`` at a time, and announce each as it ends. Return the errors, in the cells' order.

    Ctrl-C reaches this process alone, which then ends those of the cells. Their whole epochs are kept.
    """
    gpus = torch.cuda.device_count()
    jobs = jobs or gpus or torch.get_num_threads()
    threads = max(1, torch.get_num_threads() // jobs)
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for job in range(jobs):
        free.put(job)
    stopped = threading.Event()

    def error_of(cell: Cell) -> str | None:
        job = free.get()
        try:
            if stopped.is_set():
                return "stopped"
            return in_own_process(configs[cell], device=job % gpus if gpus else None, threads=threads)
        finally:
            free.put(job)

    multiprocessing.resource_tracker.ensure_running()  # a thread that starts it would get Ctrl-C unblocked
    with ThreadPoolExecutor(jobs, initializer=_block_ctrl_c) as pool:
        try:
            futures = {pool.submit(error_of, cell): cell for cell in configs}
            for done in as_completed(futures):
                row, seed = futures[done]
                announce(f"{row}, seed {seed}: {done.result() or 'done'}")
        except BaseException as reason:
            stopped.set()  # no other cell is begun
            while isinstance(reason, KeyboardInterrupt) and free.qsize() < jobs:
                for process in multiprocessing.active_children():
                    process.terminate()
                time.sleep(0.1)  # a process that is just being started is not among them yet
            raise
    return [f"{row}, seed {seed}: {error}" for future, (row, seed) in futures.items() if (error := future.result())]


def _block_ctrl_c() -> None:
    """Keep Ctrl-C from this thread and from the processes that it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


SLOW_IMPORTS = ("matplotlib.backends.backend_agg", "sklearn.datasets", "timm", "torchvision.models")


def in_own_process(config: Config, device: int | None, threads: int) -> str | None:
    """Train one cell in its own process, so that its peak memory is its own. Return the error in one line, or None.

    Without a GPU the process is forked from a server that has done the imports and started no thread. This saves
    seconds for each cell.
    """
    # A fork of a process that has initialised CUDA cannot use CUDA, and importing the kernels initialises it.
    context = multiprocessing.get_context("forkserver") if device is None else multiprocessing.get_context("spawn")
    if device is None:
        context.set_forkserver_preload(["rkl.paper.cells", *SLOW_IMPORTS])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train_cell, args=(to_plain(config), threads, sender))
    with _only_device(device):
        process.start()
    sender.close()
    try:
        error = receiver.recv()
    except EOFError:
        process.join()
        error = f"the process ended with code {process.exitcode}"
    process.join()
    return error


_environment = threading.Lock()


@contextmanager
def _only_device(device: int | None) -> Iterator[None]:
    """Make processes that are started in the block see only this GPU, from their first import on."""
    name = "CUDA_VISIBLE_DEVICES"
    with _environment:
        before = os.environ.get(name)
        if device is not None:
            # The device's number counts the GPUs that this process sees itself.
            os.environ[name] = before.split(",")[device] if before else str(device)
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before


def _end_with_parent() -> None:
    """End this process when its parent ends, even if the parent is killed. Nobody would read the answer, and if the
    command is given again, another process trains the same cell. The last whole epoch is kept."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def train_cell(plain: dict[str, Any], threads: int, sender: Any) -> None:
    """The work of a cell's process: train or go on training, then measure the gradients of the loss terms."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    config = from_plain(plain)
    file = config.out / "output.txt"
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        opened = file.open("a", encoding="utf-8")
    except OSError as error:
        sender.send(str(UnwritableError(file, error)))
        return
    with opened as output:
        sys.stdout = sys.stderr = output
        try:
            train(config, resume=True)  # for a finished run this only checks the settings
            record_gradients(config.out)
            sender.send(None)
        except Exception as error:  # a failed cell must not stop the others
            traceback.print_exc(file=output)
            sender.send(f"{told(error)} (see {file})")
