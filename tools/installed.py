"""Runs the core tests on an installed package, in a new environment from which the source tree cannot be imported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

CORE = [
    "test_contract.py",
    "test_cpu_depthwise.py",
    "test_cpu_machine.py",
    "test_cpu_separable.py",
    "test_cpu_separable_bands.py",
    "test_cpu_trelu.py",
    "test_double_backward.py",
    "test_errors.py",
    "test_errors_from_below.py",
    "test_formulas.py",
    "test_function_transforms.py",
    "test_guards.py",
    "test_import.py",
    "test_in_place.py",
    "test_layers.py",
    "test_planner.py",
    "test_reading.py",
    "test_threads.py",
    "test_tracing.py",
    "test_transforms.py",
]
"""Tests of every operator and layer on the CPU. They need the package, torch and the packages in NEEDED."""

NEEDED = ("pytest", "hypothesis", "numpy")


@dataclass(frozen=True)
class Outcome:
    """pytest's summary, and the tests that failed."""

    summary: str
    failed: tuple[str, ...]

    @property
    def green(self) -> bool:
        return not self.failed and bool(re.match(r"[1-9]\d* passed", self.summary))


def environment(folder: Path, python: str, *packages: str | Path) -> Path:
    """Make a virtual environment with these packages and their dependencies. Return its Python.

    Raises:
        RuntimeError: there is no such Python, or the packages cannot be installed together.
    """
    try:
        _run("uv", "venv", "--quiet", "--python", python, folder)
    except RuntimeError as error:
        raise RuntimeError(f"no Python {python} on this machine, and uv could not install one") from error
    interpreter = folder / "bin/python"
    _run("uv", "pip", "install", "--quiet", "--python", interpreter, *packages)
    return interpreter


def only(folder: Path, pattern: str) -> Path:
    """The only file in ``folder`` that matches ``pattern``, as `make wheel` leaves it.

    Raises:
        SystemExit: no file or several files match.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder} must hold one {pattern}, got {len(found)}; run make wheel")
    return found[0]


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack a source distribution into a folder. Return the tree's path."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def core_tests(interpreter: Path, tree: Path, folder: Path) -> Outcome:
    """Run a tree's core tests from a new folder. It holds only tests, so they import the installed package."""
    shutil.copytree(tree / "tests", folder / "tests", ignore=shutil.ignore_patterns("emulation", "gpu", "triton"))
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command: list[str | Path] = [interpreter, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in CORE]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["pytest said nothing"]
    failed = tuple(line for line in lines if line.startswith(("FAILED ", "ERROR ")))
    return Outcome(re.sub(r" in [\d.]+s.*", "", lines[-1]), failed)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"{command[0]} ended with {done.returncode}")
