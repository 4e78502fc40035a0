"""What is built and usable here, and which backend serves a call."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import ops
from ._setting import Setting
from ._surroundings import differentiated, settled_while_compiled

Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
NAMES: tuple[Backend, ...] = get_args(Backend)
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)

LEAST_CAPABILITY = (8, 0)
"""The oldest compute capability that the CUDA kernels are compiled for, and that Triton supports."""

# Triton reads this variable when it is imported. Where it is set, Triton kernels run on the CPU, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_forced = Setting("auto")


@dataclass(frozen=True)
class Status:
    """Whether a backend can serve calls here.

    Attributes:
        available: whether it can.
        reason: where it cannot, why; where it can, what the backend is.

    Examples:
        >>> rk.backends()["reference"]
        Status(available=True, reason='plain PyTorch, any device')
    """

    available: bool
    reason: str


def _load(module: str) -> str | None:
    """Import an extension module. Return None where it loads, else why not. This calls no GPU driver."""
    try:
        importlib.import_module(f"rkl_kernels.{module}")
    except ImportError as error:
        if importlib.util.find_spec(f"rkl_kernels.{module}") is None:
            return "not built: build it with `pip install .` from the source tree"
        return f"built, but does not load: {error}"
    return None


_problems = {"cpu": _load("_C"), "cuda": _load("_C_cuda")}
_BUILT = frozenset(device for device, problem in _problems.items() if problem is None)


def _register_triton_kernels() -> torch.library.Library:
    """Register kernels that import Triton at their first call: a saved program may call one before anything else."""
    library = torch.library.Library("rkl_triton", "IMPL")

    def register(name: str) -> None:
        def kernel(*args: Any) -> Any:
            return importlib.import_module("rkl_kernels.triton").IMPLEMENTATIONS[name](*args)

        library.impl(name, kernel, "CPU" if INTERPRETED else "CUDA")

    for name in ops.SCHEMAS:
        register(name)
    return library


_triton_library = _register_triton_kernels()


def _cpu_status() -> Status:
    return Status(_problems["cpu"] is None, _problems["cpu"] or "C++ kernels")


def _cuda_status() -> Status:
    problem = _problems["cuda"]
    if problem and problem.startswith("not built"):
        version = torch.version.cuda
        needed = f"nvcc of CUDA {version.split('.')[0]}" if version else "nvcc, with a CUDA build of torch,"
        return Status(False, f"{problem} where {needed} is found")
    if problem:
        return Status(False, problem)
    if not torch.cuda.is_available():
        return Status(False, "built, but torch sees no GPU here")
    return _old_gpus() or Status(True, "CUDA C++ kernels")


def _triton_status() -> Status:
    if importlib.util.find_spec("triton") is None:
        return Status(False, "Triton is not installed")
    if importlib.util.find_spec("rkl_kernels.triton") is None:
        return Status(False, "this installation has no Triton kernels")
    if not INTERPRETED and not torch.cuda.is_available():
        return Status(False, "torch sees no GPU here; TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly")
    if INTERPRETED:
        return Status(True, "Triton kernels, interpreted on CPU tensors")
    return _old_gpus() or Status(True, "Triton kernels on the GPU")


def _old_gpus() -> Status | None:
    """The status of a machine whose GPUs are all too old; None where at least one GPU is new enough."""
    refusals = [_age_refusal(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return Status(False, str(refusals[0])) if refusals and all(refusals) else None


def _age_refusal(gpu: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(gpu)
    if capability >= LEAST_CAPABILITY:
        return None
    least, got = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, capability))
    return f"it serves GPUs of compute capability {least} and newer, got {got}"


_STATUS: dict[str, Callable[[], Status]] = {
    "reference": lambda: Status(True, "plain PyTorch, any device"),
    "cpu": _cpu_status,
    "triton": _triton_status,
    "cuda": _cuda_status,
}


def status(backend: str) -> Status:
    """Whether a backend can serve calls here. It asks torch for a GPU, so it must not be called at import."""
    return _STATUS[backend]()


def backends() -> dict[str, Status]:
    """The status of every backend: whether it can serve calls here, and why not. ``python -m rkl_kernels`` prints it.

    This asks torch for a GPU; importing the package does not.

    Examples:
        >>> list(rk.backends())
        ['reference', 'cpu', 'triton', 'cuda']
    """
    return {name: status(name) for name in _STATUS}


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Serve all calls in a ``with`` block by one backend.

    The choice holds for the calling thread and for forward calls. A backward runs on the backend of its forward.
    A call that the backend cannot serve raises an error. Only "auto" falls back to another backend.

    Args:
        name: "auto", "reference" (plain PyTorch), "cpu" (C++), "triton" or "cuda" (CUDA C++).

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend is not available here; the message says why.

    Examples:
        >>> with rk.use_backend("reference"):
        ...     rk.explain("trelu", torch.zeros(4)).backend
        'reference'
    """
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    if name != "auto":
        found = status(name)
        if not found.available:
            raise RuntimeError(f"backend {name!r} is not available: {found.reason}")
    with _forced.held(name):
        yield


def forced() -> str:
    """The backend that ``use_backend`` has set for this thread; "auto" outside its blocks."""
    return str(_forced.value)


def refusal(
    backend: str,
    operator: str,
    device: torch.device,
    dtype: torch.dtype,
    differentiated: bool = False,
    multiplied: bool = False,
    layout: torch.layout = torch.strided,
) -> str | None:
    """Why ``backend`` cannot serve ``operator`` on tensors of this device, dtype and layout; None where it can.
    ``multiplied``: each channel has several filters."""
    if backend == "reference":
        return None
    found = status(backend)
    if not found.available:
        return found.reason
    served = "cpu" if backend == "cpu" or (backend == "triton" and INTERPRETED) else "cuda"
    if backend != "triton" and not torch._C._dispatch_has_kernel_for_dispatch_key(f"rkl::{operator}", served.upper()):
        return f"it has no kernel for {operator}"
    if dtype not in KERNEL_TYPES:
        return f"it serves float32, bfloat16 and float16, got {dtype}"
    if device.type != served:
        return f"it serves {served} tensors, got {device}"
    if served == "cuda" and (old := _age_refusal(device)):
        return old
    if layout != torch.strided:  # oneDNN's layout, say, which F.conv2d accepts
        return f"it serves strided tensors, got {layout}"
    if multiplied:
        return "it serves one filter a channel"
    if differentiated:
        return "torch.func and forward-mode AD differentiate PyTorch's own operators only"
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        from .triton.launch import interpreter_serves_bf16

        if not interpreter_serves_bf16():
            return "Triton's interpreter computes bfloat16 wrongly; use float16 or float32"
    return None


def choose(operator: str, x: Tensor, multiplied: bool = False) -> str:
    """The backend that serves ``operator`` on tensors like ``x``, with the settings of this moment."""
    return _chosen(_forced.value, operator, x.device, x.dtype, differentiated(), multiplied, x.layout)


# torch.compile may keep the result: it depends on the arguments and on facts that stay the same in a process.
@settled_while_compiled
def _chosen(forced: str, operator: str, device: torch.device, dtype: torch.dtype, *how: Any) -> str:
    return _decision(forced, operator, device, dtype, *how)


@lru_cache(maxsize=1024)
def _decision(forced: str, operator: str, device: torch.device, dtype: torch.dtype, *how: Any) -> str:
    if forced != "auto":
        reason = refusal(forced, operator, device, dtype, *how)
        if reason:
            raise RuntimeError(f"backend {forced!r} cannot serve this call: {reason}; use use_backend('auto')")
        return forced
    # On a GPU, CUDA C++ comes before Triton: its calls take less time on the host.
    order = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    fit = (backend for backend in order if refusal(backend, operator, device, dtype, *how) is None)
    return next(fit, "reference")


def is_served(x: Tensor | None, weight: Tensor | None) -> bool:
    """Whether the compiled kernels of the image's device serve an image and its depthwise filter."""
    if x is None or weight is None:
        return False
    shape = x.shape
    return is_built(x) and len(shape) == 4 and weight.dim() == 4 and weight.shape[0] == shape[1]


def is_built(x: Tensor) -> bool:
    """Whether the image's device has compiled kernels, they serve its dtype and layout, and no backend is forced."""
    is_any = _forced.value == "auto" and x.dtype in KERNEL_TYPES and _is_built_for(x.device)
    return is_any and x.layout == torch.strided


@lru_cache(maxsize=64)
def _is_built_for(device: torch.device) -> bool:
    return device.type in _BUILT and (device.type != "cuda" or _age_refusal(device) is None)


def namespace_for(operator: str, x: Tensor, multiplied: bool = False) -> Any:
    """The operators of the backend that serves the call; None for the reference."""
    return _NAMESPACES[choose(operator, x, multiplied)]


_NAMESPACES = {"reference": None, "cpu": ops.rkl, "cuda": ops.rkl, "triton": ops.rkl_triton}
