"""The modes in which a forward is read: blocks in which questions about its call have other answers, and a block after
which the caller's random numbers are the same."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ._backends import forced, use_backend


def surroundings() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    casts = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), casts, forced()


@contextmanager
def cast_and_by_reference() -> Iterator[None]:
    """Autocast of every kind of device, and a backend other than the choice between them."""
    kinds = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(kind) for kind in kinds]
    for kind in kinds:
        torch.set_autocast_enabled(kind, True)
    try:
        with torch.enable_grad(), use_backend("reference"):
            yield
    finally:
        for kind, enabled in zip(kinds, before, strict=True):
            torch.set_autocast_enabled(kind, enabled)


QUESTIONS = (
    (torch.compiler, "is_compiling"),
    (torch.compiler, "is_dynamo_compiling"),
    (torch.compiler, "is_exporting"),
    (torch.jit, "is_tracing"),
    (torch.onnx, "is_in_onnx_export"),
)
"""What a forward may ask of what it is called for: PyTorch's functions, which have no other way to be told."""


@contextmanager
def as_exported() -> Iterator[None]:
    """The answers of a compiler or an exporter, to this thread alone."""
    reader, before = threading.get_ident(), [getattr(module, name) for module, name in QUESTIONS]
    for (module, name), function in zip(QUESTIONS, before, strict=True):
        setattr(module, name, lambda function=function: threading.get_ident() == reader or function())
    try:
        with torch.enable_grad():
            yield
    finally:
        for (module, name), function in zip(QUESTIONS, before, strict=True):
            setattr(module, name, function)


def random_state() -> tuple[Any, ...]:
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002  the model's code may draw from it
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(keys).tobytes(), position


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Whatever is drawn in the block, the caller's next numbers are those that would have come without it."""
    state, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)  # noqa: NPY002
