"""The installed package: what it reports, what its binaries need, and how it works without them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import forks
import pytest
import torch

import rkl_kernels as rk

ROOT = Path(__file__).parents[1]
EXTENSIONS = sorted(Path(rk.__file__).parent.glob("_C*.so"))


def test_extensions_are_built():
    assert "_C.abi3.so" in [path.name for path in EXTENSIONS]


@pytest.mark.parametrize("path", EXTENSIONS, ids=lambda path: path.name)
def test_extensions_need_the_stable_abi_alone(path):
    """They need no C++ symbol of PyTorch, and of Python only symbols of the limited API."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    needed = [line.split()[-1].split("@")[0] for line in listing.splitlines()]
    torch_symbols = [name for name in needed if re.search(r"(2at|3c10|5torch|6caffe2)", name) and name.startswith("_Z")]
    python_symbols = {name for name in needed if name.startswith(("Py", "_Py"))}
    assert torch_symbols == []
    assert python_symbols <= {"PyModule_Create2"}
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in needed)


def test_says_what_is_built():
    report = forks.run("import runpy; runpy.run_module('rkl_kernels', run_name='__main__')").stdout
    for name, status in rk.backends().items():
        assert re.search(rf"{name} +{'yes' if status.available else 'no'} +{re.escape(status.reason)}", report)


def test_works_without_any_extension(tmp_path):
    """With the Python files alone everything runs on the reference, and the report says what is missing."""
    shutil.copytree(
        Path(rk.__file__).parent, tmp_path / "rkl_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = """
import sys; sys.path.insert(0, sys.argv[1])
sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]  # an editable install's
import torch, rkl_kernels as rk
assert rk.__file__.startswith(sys.argv[1])
x = torch.randn(1, 4, 5, 5, requires_grad=True)
rk.SeparableConv2d(4, 2, 3, activation="trelu")(rk.trelu(x)).sum().backward()
assert rk.explain("trelu", x).backend == "reference"
print(rk.backends()["cpu"].reason)
"""
    run = forks.run(code, str(tmp_path), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "not built" in run.stdout


def test_wheel_is_tagged_abi3(tmp_path):
    """One wheel for every Python from 3.10: built from the objects at hand, and holding both packages. Another ninja
    than the environment's would not take the objects, and compile for minutes."""
    build = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"resnet_kl-.*-cp310-abi3-.*\.whl", wheel.name)
    files = zipfile.ZipFile(wheel).namelist()
    assert {"rkl_kernels/_C.abi3.so", "rkl_kernels/py.typed", "rkl_kernels/__init__.py", "rkl/cli.py"} <= set(files)


def test_source_distribution_holds_every_source(tmp_path):
    """Those of the CUDA kernels too where it is made without them, and the records that pages are made from."""
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist")
    own_runs = {str(ROOT): {"runs"}}  # those in results/ are tracked
    shutil.copytree(ROOT, tree, ignore=lambda folder, names: left_out(folder, names) | own_runs.get(str(folder), set()))
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path / "made")]
    subprocess.run(command, cwd=tree, env=os.environ | {"FORCE_CUDA": "0"}, capture_output=True, check=True)
    (archive,) = (tmp_path / "made").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    sources = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.is_file()}
    assert any(name.endswith(".cu") for name in sources)
    assert sources <= held
    endings = {".md", ".png", ".json", ".jsonl", ".yaml"}
    records = {str(path.relative_to(tree)) for path in (tree / "results").rglob("*") if path.suffix in endings}
    assert any(name.endswith("seed-0/log.jsonl") for name in records)
    assert records <= held
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "tests/conftest.py"} <= held


def test_explains_a_call():
    x, weight, pointwise = torch.zeros(2, 8, 10, 10), torch.zeros(8, 1, 3, 3), torch.zeros(16, 8, 1, 1)
    told = rk.explain("depthwise_conv2d", x, weight, padding=1)
    assert told.bytes == 4 * (1600 + 72 + 1600)
    assert told.operations == 2 * 1600 * 9
    assert rk.explain("separable_conv2d", x, weight, pointwise, stride=2, padding=1).bytes == 4 * (
        1600 + 72 + 128 + 800
    )
    bias, both = torch.zeros(8), (torch.zeros(8), torch.zeros(16))
    assert rk.explain("depthwise_conv2d", x, weight, bias, padding=1).bytes == told.bytes + 4 * 8
    assert rk.explain("separable_conv2d", x, weight, pointwise, *both, 2, 1).bytes == 4 * (1600 + 72 + 128 + 800 + 24)
    assert rk.explain("trelu", x.double()).backend == "reference"
    with rk.use_backend("reference"):
        assert rk.explain("trelu", x).backend == "reference"
    assert "backend" in str(told)
