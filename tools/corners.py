"""Tests one wheel at the limits of what it supports: the oldest and the newest torch, each with several Pythons.

The wheel is not built again, so this tests LibTorch's Stable ABI and Python's limited API. A last row compiles the CPU
kernels with clang++. The table also names what this machine does not have.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tools.installed import NEEDED, Outcome, core_tests, environment, only, unpack

OLDEST_TORCH = "torch==2.11.*"
VERSIONS = "import platform, torch; print(platform.python_version(), torch.__version__)"


def corner(wheel: Path, tree: Path, python: str, torch: str) -> tuple[str, Outcome | None]:
    """The versions and the core tests' outcome; or, if they cannot be installed here, the reason and None."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            interpreter = environment(folder / "venv", python, wheel, torch, *NEEDED)
        except RuntimeError as error:
            return f"not at hand: {' '.join(str(error).split())[:120]}", None
        versions = subprocess.run([interpreter, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
        return "Python {}, torch {}".format(*versions.split()), core_tests(interpreter, tree, folder / "run")


def clang_corner(tree: Path) -> tuple[str, Outcome | None]:
    """The same for the CPU kernels compiled with clang++, with the torch of this environment."""
    if not shutil.which("clang++"):
        return "not at hand: no clang++ on PATH", None
    with tempfile.TemporaryDirectory() as scratch:
        settings = os.environ | {"CXX": "clang++", "CC": "clang", "FORCE_CUDA": "0"}
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", scratch, str(tree)]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
        if done.returncode:
            return "clang++ does not compile the CPU kernels", Outcome(done.stdout[-2000:], ("the build",))
        import torch

        return corner(only(Path(scratch), "*.whl"), tree, sys.executable, f"torch=={torch.__version__.split('+')[0]}")


def main() -> int:
    """Print the table. Return 0 if every corner that this machine has is green."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with the wheel and the source distribution")
    parser.add_argument("--pythons", nargs="+", default=["3.10", "3.13", "3.14"], help="versions, or interpreters")
    parser.add_argument("--only", help="run only corners whose names contain this text")
    arguments = parser.parse_args()

    wheel, sdist = only(arguments.dist, "*.whl").resolve(), only(arguments.dist, "*.tar.gz")
    green = True
    print(f"{wheel.name}\n\n| corner | versions | core tests |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        tree = unpack(sdist, Path(scratch))
        corners = {
            f"{age} torch, Python {python}": partial(corner, wheel, tree, python, torch)
            for age, torch in (("oldest", OLDEST_TORCH), ("newest", "torch"))
            for python in arguments.pythons
        }
        corners["clang++"] = partial(clang_corner, tree)
        for name, run in corners.items():
            if arguments.only and arguments.only not in name:
                continue
            versions, outcome = run()
            print(f"| {name} | {versions} | {outcome.summary if outcome else ''} |", flush=True)
            for failure in outcome.failed if outcome else ():
                print(f"| | | {failure} |", flush=True)
            green = green and (outcome is None or outcome.green)
    return int(not green)


if __name__ == "__main__":
    sys.exit(main())
