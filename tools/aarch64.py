"""The CPU kernels cross-compiled for aarch64, and the operators' tests on them under QEMU.

Needs two packages of Debian or Ubuntu, g++-aarch64-linux-gnu and qemu-user. Everything else is downloaded into one
folder and needs no administrator's rights: an aarch64 Python by apt, torch (with its CUDA libraries, 4.5 GB) and pytest
by uv.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from setup import CXX_FLAGS, sources

ROOT = Path(__file__).resolve().parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CPU = "neoverse-n1"
MIDR = "0x00000000413fd0c1"
PROCESSOR = """\
processor	: {}
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1

"""
"""What Linux reports about that CPU. Without it, QEMU shows programs the host's file, and with an x86's file two
libraries of torch crash."""

TESTS = ("test_cpu_trelu.py", "test_cpu_depthwise.py", "test_cpu_separable.py", "test_cpu_separable_bands.py")


def run(*command: str | Path, **options: str) -> None:
    subprocess.run(command, check=True, **options)


def system(folder: Path) -> Path:
    """Make the root of an aarch64 system with Python, from this machine's package sources. Return its Python."""
    root, apt = folder / "root", folder / "apt"
    if not (root / "usr/bin/python3").exists():
        for name in ("lists/partial", "archives/partial"):
            (apt / name).mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()  # no package counts as installed, so apt downloads all that Python needs
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Install-Recommends": "0",
            "APT::Sandbox::User": "root",
            "Debug::NoLocking": "1",
            "Dir::Cache": apt,
            "Dir::State::Lists": apt / "lists",
            "Dir::State::status": apt / "status",
        }
        get = ("apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items()))
        run(*get, "update")
        run(*get, "install", "--yes", "--download-only", "python3", "libpython3-dev", "libstdc++6")
        for package in sorted((apt / "archives").glob("*.deb")):
            run("dpkg-deb", "-x", package, root)
    cpus = range(os.cpu_count() or 1)
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text("".join(PROCESSOR.format(number) for number in cpus))
    for number in cpus:
        identification = root / f"sys/devices/system/cpu/cpu{number}/regs/identification"
        identification.mkdir(parents=True, exist_ok=True)
        (identification / "midr_el1").write_text(f"{MIDR}\n")
    return (root / "usr/bin/python3").resolve()


def packages(folder: Path, python: Path) -> Path:
    """Install torch and what the tests import. Return the folder."""
    site = folder / "site"
    if not (site / "pytest").exists():
        version = python.name.removeprefix("python")
        names = (f"torch=={torch.__version__.split('+')[0]}", "numpy", "hypothesis", "pytest")
        platform = ("--python-platform", "aarch64-manylinux_2_28", "--python-version", version)
        run("uv", "pip", "install", "--quiet", *platform, "--target", site, *names)
    return site


def extension(folder: Path, python: Path, site: Path) -> Path:
    """Compile the CPU extension with the flags of `setup.py`. A warning is an error. Return the module's file."""
    include = [site / "torch/include", site / "torch/include/torch/csrc/api/include"]
    include += [folder / "root/usr/include" / python.name, folder / "root/usr/include"]
    flags = [
        *CXX_FLAGS,
        "-std=c++20",
        "-DNDEBUG",
        "-fwrapv",
        "-fPIC",
        "-Werror",
        "-Icsrc",
        "-DPy_LIMITED_API=0x030A0000",
    ]
    flags += ["-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    flags += [word for path in include for word in ("-isystem", str(path))]
    files = sources("csrc/ops.cpp", "csrc/cpu/**/*.cpp")
    objects = [folder / "objects" / f"{file.replace('/', '-')}.o" for file in files]
    objects[0].parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda file, made: run(COMPILER, *flags, "-c", file, "-o", made), files, objects))
    module = folder / "tree/rkl_kernels/_C.abi3.so"
    libraries = ("-L", site / "torch/lib", "-ltorch", "-ltorch_cpu", "-lc10")
    run(COMPILER, "-shared", *objects, "-o", module, *libraries)
    return module


def interpreter(folder: Path, python: Path, site: Path) -> Path:
    """Make a program that runs the emulated Python, so that tests can start one too. Return its path."""
    program, hook = folder / "python", folder / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(f"import sys\n\nsys.executable = {str(program)!r}\n")
    path = os.pathsep.join(map(str, (hook, site, folder / "tree")))
    program.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {EMULATOR} -cpu {CPU} -L {folder / "root"} {python} "$@"\n')
    program.chmod(0o755)
    return program


def main() -> int:
    """Build what is missing, run the tests, and return pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/aarch64", help="folder for all files")
    parser.add_argument("tests", nargs="*", default=[f"tests/{name}" for name in TESTS], help="arguments for pytest")
    arguments = parser.parse_args()
    if missing := [program for program in (COMPILER, EMULATOR) if not shutil.which(program)]:
        parser.error(f"{missing[0]} must be on PATH, got none; apt-get install g++-aarch64-linux-gnu qemu-user")

    folder = arguments.folder.resolve()
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    skipped = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("benchmarks", "csrc", "rkl", "rkl_kernels", "tests", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", tree)
    python = system(folder)
    site = packages(folder, python)
    print(f"{extension(folder, python, site)}: compiled", flush=True)
    command = [interpreter(folder, python, site), "-m", "pytest", "-p", "no:cacheprovider", *arguments.tests]
    return subprocess.run(command, cwd=tree, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
