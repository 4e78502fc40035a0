"""The line that describes the machine, at the head of every table of figures."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import rkl_kernels as rk


def _cpu_name() -> str:
    """The processor's name. On x86 its family and model follow: virtual machines may give several kinds one name."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", cpuinfo, re.MULTILINE))
    name = facts.get("model name", "").strip() or platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def held_to() -> str | None:
    """The instruction set below AVX-512 to which ATEN_CPU_CAPABILITY limits torch and the CPU kernels, or None."""
    limit = os.environ.get("ATEN_CPU_CAPABILITY")
    return limit if limit in ("default", "avx2") else None


def check_device(device: str) -> None:
    """
    Raises:
        ValueError: the device cannot be timed here.
    """
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda where torch sees a GPU, got {device!r}")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Facts about the machine: device, threads, instruction set and versions."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "held_to": None if device == "cuda" else held_to(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rkl_kernels": rk.__version__,
    }


def capacity(device: str) -> int:
    """The device's total memory in bytes."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine_line(facts: dict[str, Any]) -> str:
    """The facts of :func:`machine` in one line."""
    held = " held to" if facts.get("held_to") else ""  # older records lack the key
    return (
        f"{facts['device']}, {facts['threads']} of {facts['cores']} cores,{held} {facts['isa']}, "
        f"torch {facts['torch']}, Python {facts['python']}"
    )


def other_machine(recorded: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The record's line, where it is of another machine or of other versions than here; None where both are alike.

    Rows of two machines must not stand under one line.
    """
    line = machine_line(recorded)
    return None if line == machine_line(here) else line


def slug(facts: dict[str, Any]) -> str:
    """A file name for the device: its name, the instruction set that it is limited to, and the number of threads."""
    name = f"{facts['device']} {facts.get('held_to') or ''} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
