"""What is built and usable here, and which backend serves a call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import fusion, ops

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton reads the variable when it is imported, and so do the kernels: then they run on the CPU, for tests.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_forced = "auto"


@dataclass(frozen=True)
class Status:
    """Whether a backend can serve calls here; ``reason`` says why not, or what it is."""

    available: bool
    reason: str


def _load(module: str) -> str | None:
    """Import an extension module; None where it loaded, else why it did not."""
    try:
        importlib.import_module(f"rkl_kernels.{module}")
    except ImportError as error:
        if importlib.util.find_spec(f"rkl_kernels.{module}") is None:
            return "not built: build it with `pip install .` from the source tree"
        return f"built, but does not load: {error}"
    return None


def _cuda_status(problem: str | None) -> Status:
    if problem:
        return Status(False, problem + (" where nvcc is found" if problem.startswith("not built") else ""))
    if not torch.cuda.is_available():
        return Status(False, "built, but torch sees no GPU here")
    return Status(True, f"CUDA C++ kernels on {torch.cuda.get_device_name()}")


def _triton_status() -> Status:
    if importlib.util.find_spec("triton") is None:
        return Status(False, "Triton is not installed")
    if importlib.util.find_spec("rkl_kernels.triton") is None:
        return Status(False, "this installation has no Triton kernels")
    if not _INTERPRETED and not torch.cuda.is_available():
        return Status(False, "torch sees no GPU here; TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly")
    importlib.import_module("rkl_kernels.triton")
    return Status(True, "Triton kernels, interpreted on CPU tensors" if _INTERPRETED else "Triton kernels on the GPU")


def _survey() -> dict[str, Status]:
    cpu_problem, cuda_problem = _load("_C"), _load("_C_cuda")
    return {
        "reference": Status(True, "plain PyTorch, any device"),
        "cpu": Status(cpu_problem is None, cpu_problem or "C++ kernels"),
        "triton": _triton_status(),
        "cuda": _cuda_status(cuda_problem),
    }


_status = _survey()
_kernels = {
    (backend, name)
    for backend, namespace, key in (
        ("cpu", "rkl", "CPU"),
        ("cuda", "rkl", "CUDA"),
        ("triton", "rkl_triton", "CPU" if _INTERPRETED else "CUDA"),
    )
    for name in ops.SCHEMAS
    if _status[backend].available and torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)
}


def backends() -> dict[str, Status]:
    """Every backend with what it can do here and, where it cannot, why. ``python -m rkl_kernels`` prints it."""
    return dict(_status)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve calls in the block by one backend: "auto", "reference", "cpu", "triton" or "cuda".

    It holds for the whole process, and for forward calls: a backward runs on the backend that served its forward.
    A call that the backend cannot serve is an error, never a silent fall-back; "auto" is the choice that falls back.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend is not available here; the message says why.
    """
    global _forced
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    if name != "auto" and not _status[name].available:
        raise RuntimeError(f"backend {name!r} is not available: {_status[name].reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def refusal(backend: str, operator: str, x: Tensor) -> str | None:
    """Why ``backend`` cannot serve ``operator`` on tensors like ``x``; None where it can."""
    if backend == "reference":
        return None
    if not _status[backend].available:
        return _status[backend].reason
    if (backend, operator) not in _kernels:
        return f"it has no kernel for {operator}"
    if x.dtype not in KERNEL_TYPES:
        return f"it serves float32, bfloat16 and float16, got {x.dtype}"
    device = "cpu" if backend == "cpu" or (backend == "triton" and _INTERPRETED) else "cuda"
    if x.device.type != device:
        return f"it serves {device} tensors, got {x.device}"
    if backend == "triton" and _INTERPRETED and x.dtype == torch.bfloat16:
        from .triton.launch import interpreter_serves_bf16

        if not interpreter_serves_bf16():
            return "Triton's interpreter computes bfloat16 wrongly; use float16 or float32"
    return None


def choose(operator: str, x: Tensor) -> str:
    """The backend that serves ``operator`` on tensors like ``x``."""
    if _forced != "auto":
        reason = refusal(_forced, operator, x)
        if reason:
            raise RuntimeError(f"backend {_forced!r} cannot serve this call: {reason}; use use_backend('auto')")
        return _forced
    order = fusion.preferred(operator, x) if x.device.type == "cuda" else ("cpu",)
    return next((backend for backend in order if refusal(backend, operator, x) is None), "reference")


def namespace_for(operator: str, x: Tensor) -> Any:
    """The operators of the backend that serves the call; None for the reference."""
    backend = choose(operator, x)
    if backend == "reference":
        return None
    return ops.rkl_triton if backend == "triton" else ops.rkl
