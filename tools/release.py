"""Checks what ``make wheel`` left in dist/: the archives' contents, and the wheel in a new environment."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from tools.installed import NEEDED, core_tests, environment, only, unpack

BINARIES = {"rkl_kernels/_C.abi3.so", "rkl_kernels/_C_cuda.abi3.so"}
PACKAGES = ("rkl/", "rkl_kernels/")
SOURCES = (*PACKAGES, "csrc/", "tests/", "benchmarks/", "docs/", "examples/", "tools/", "results/")
ALSO = {
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "requirements.txt",
    "setup.py",
}
WHEEL_NAME = r"resnet_kl-[^-]+-cp310-abi3-manylinux_[a-z0-9_.]+\.whl"


def wheel_faults(names: Iterable[str], tracked: set[str]) -> list[str]:
    """What is wrong with a wheel. It must hold the packages' tracked files, the binaries and its metadata, no more."""
    held = {name for name in names if ".dist-info/" not in name and not name.endswith("/")}
    wanted = {name for name in tracked if name.startswith(PACKAGES)} | BINARIES
    return _differences("the wheel", missing=wanted - held, surplus=held - wanted)


def sdist_faults(names: Iterable[str], tracked: set[str]) -> list[str]:
    """What is wrong with a source distribution. It must hold all that builds and tests the packages, the records that
    ``rkl report`` makes its pages from, and only tracked files."""
    held = set(names)
    made = {name for name in held if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    wanted = {name for name in tracked if name.startswith(SOURCES)} | ALSO
    return _differences("the source distribution", missing=wanted - held, surplus=held - made - tracked)


def _differences(archive: str, missing: set[str], surplus: set[str]) -> list[str]:
    return [f"{archive} lacks {name}" for name in sorted(missing)] + [
        f"{archive} must not hold {name}" for name in sorted(surplus)
    ]


def archive_faults(wheel: Path, sdist: Path) -> list[str]:
    listing = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout
    tracked = set(listing.splitlines())
    with zipfile.ZipFile(wheel) as file:
        faults = wheel_faults(file.namelist(), tracked)
    with tarfile.open(sdist) as file:
        held = [member.name.partition("/")[2] for member in file if member.isfile()]
    faults += sdist_faults(held, tracked)
    if not re.fullmatch(WHEEL_NAME, wheel.name):
        faults.append(f"the wheel must be for every Python from 3.10 and tagged manylinux, got {wheel.name}")
    return faults


def main(dist: Path) -> int:
    """Print what was found. Return 0 if there is no fault."""
    wheel, sdist = only(dist, "*.whl"), only(dist, "*.tar.gz")
    faults = archive_faults(wheel, sdist)
    print(f"{wheel.name}, {sdist.name}: {'; '.join(faults) or 'hold what they should'}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        interpreter = environment(folder / "venv", sys.executable, wheel)
        report = subprocess.run(
            [interpreter, "-m", "rkl_kernels"], cwd=folder, capture_output=True, text=True, check=False
        )
        print(report.stdout + report.stderr)
        environment(folder / "tested", sys.executable, wheel, *NEEDED)
        outcome = core_tests(folder / "tested/bin/python", unpack(sdist, folder), folder / "run")
    print("\n".join([f"core tests on the installed wheel: {outcome.summary}", *outcome.failed]))
    return int(bool(faults or report.returncode or not outcome.green))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
