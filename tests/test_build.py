"""How the package is built: which compiler it takes, what wheels and editable installs hold. No kernel is compiled."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from setuptools import Distribution
from setuptools.command.build import build as build_command

import rkl_kernels as rk

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Writes the output file that it is told to write, and the list of headers that ninja expects beside it.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in -o | -MF) shift; echo stub: > "$1" ;; esac
  shift
done
"""
NVCC = """#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release {version}, V{version}.0" ;;
  --dryrun) echo "#$ TOP={home}" >&2 ;;
esac
"""


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module, for its functions. Nothing is built."""
    spec = importlib.util.spec_from_file_location("rkl_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _toolkit(home: Path, version: str) -> Path:
    """A CUDA toolkit whose nvcc answers two questions and compiles nothing."""
    _program(home / "bin/nvcc", NVCC.format(version=version, home=home))
    return home


@pytest.fixture
def on_path(build, monkeypatch, tmp_path):
    """Put a toolkit of a version on PATH, with no other within reach."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build, "index_toolkits", lambda: iter(()))

    def put(version: str) -> Path:
        home = _toolkit(tmp_path / f"cuda-{version}", version)
        monkeypatch.setenv("PATH", f"{home / 'bin'}:/usr/bin:/bin")
        return home

    return put


def test_takes_a_toolkit_of_torchs_major_version(build, on_path):
    home = on_path("13.2")
    assert build.cuda_home("13.0", None) == home
    assert build.cuda_home("13.0", "1") == home
    assert build.cuda_home("13.0", "0") is None


def test_a_toolkit_of_another_major_version_leaves_a_cpu_build(build, on_path, capsys):
    on_path("12.8")
    assert build.cuda_home("13.0", None) is None
    (told,) = capsys.readouterr().err.splitlines()
    assert "torch is built for CUDA 13.0 and nvcc is 12.8" in told
    assert "cuda-toolkit[nvcc,cccl]==13.*" in told
    with pytest.raises(SystemExit, match=r"torch is built for CUDA 13.0 and nvcc is 12.8"):
        build.cuda_home("13.0", "1")
    assert capsys.readouterr().err == ""


def test_a_fitting_toolkit_is_taken_wherever_it_stands(build, on_path, monkeypatch, tmp_path):
    """The toolkit of the index comes first, but one that does not fit does not hide the one on PATH."""
    home = on_path("12.8")
    other = _toolkit(tmp_path / "nvidia/cu13", "13.0")
    monkeypatch.setattr(build, "index_toolkits", lambda: iter([other]))
    assert build.cuda_home("12.6", None) == home
    assert build.cuda_home("13.0", None) == other
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert build.cuda_home("13.0", None) is None  # a set CUDA_HOME is the user's choice


def test_says_what_is_missing(build, on_path, monkeypatch, tmp_path):
    on_path("13.0")
    assert "without CUDA" in build.find_toolkit(None)[1]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert "nvcc is nowhere to be found" in build.find_toolkit("13.0")[1]


def test_finds_the_toolkit_of_the_package_index(build, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    home = tmp_path / "nvidia/cu13"
    _toolkit(home, "13.0")
    assert list(build.index_toolkits()) == []  # nvcc is of no use without cicc
    _program(home / "nvvm/bin/cicc", "")
    assert list(build.index_toolkits()) == [home]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A source tree that was built before by another version of the package, with a CUDA compiler."""
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "runs", "results")
    shutil.copytree(ROOT, tree, ignore=left_out)
    _program(tmp_path / "bin/c++", COMPILER)
    before = build_command(Distribution())
    before.ensure_finalized()
    built = tree / before.build_platlib / "rkl_kernels"
    built.mkdir(parents=True)
    (built / "gone.py").write_text("old")
    for folder in (built, tree / "rkl_kernels"):
        (folder / "_C_cuda.abi3.so").write_text("old")
    return tree


def _make(tree: Path, kind: str, **settings: str) -> set[str]:
    """The files in a wheel that the build back end makes. The compiler is a stub."""
    made = tree.parent / "made"
    made.mkdir()
    compiler = str(tree.parent / "bin/c++")
    done = subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_{kind}({str(made)!r})"],
        cwd=tree,
        env=os.environ | {"CXX": compiler, "CC": compiler, "TORCH_DONT_CHECK_COMPILER_ABI": "1"} | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(made)
        return set(archive.namelist())


def test_a_wheel_holds_nothing_that_an_earlier_build_left(tree):
    files = _make(tree, "wheel", FORCE_CUDA="0")
    assert {"rkl_kernels/_C.abi3.so", "rkl_kernels/py.typed", "rkl_kernels/layers.py", "rkl/network/model.py"} <= files
    assert "rkl_kernels/_C_cuda.abi3.so" not in files
    assert "rkl_kernels/gone.py" not in files
    assert (tree / "rkl_kernels/_C_cuda.abi3.so").exists()  # not the wheel's to remove


def test_an_unfit_compiler_does_not_stop_the_build(tree):
    files = _make(tree, "wheel", CUDA_HOME=str(_toolkit(tree.parent / "cuda-9", "9.2")))
    assert {name for name in files if name.endswith(".so")} == {"rkl_kernels/_C.abi3.so"}


@pytest.mark.parametrize("asked", [True, False], ids=["asked for", "unfit toolkit"])
def test_an_editable_install_is_a_plain_path(tree, asked):
    """Type checkers follow a path, but not an import hook. The tree holds only the binaries that were made, whatever
    the reason that one was not."""
    settings = {"FORCE_CUDA": "0"} if asked else {"CUDA_HOME": str(_toolkit(tree.parent / "cuda-9", "9.2"))}
    files = _make(tree, "editable", **settings)
    (path,) = (name for name in files if name.endswith(".pth"))
    assert (tree.parent / "made" / path).read_text().strip() == str(tree)
    assert not any("finder" in name for name in files)
    assert [path.name for path in (tree / "rkl_kernels").glob("*.so")] == ["_C.abi3.so"]


def test_the_version_stands_in_one_place(tree):
    (tree / "rkl_kernels/__init__.py").write_text('__version__ = "9.8.7"\n')
    assert "resnet_kl-9.8.7.dist-info/METADATA" in _make(tree, "wheel", FORCE_CUDA="0")
    assert "version" not in PROJECT["project"]


def test_the_extra_cuda_holds_no_torch_back():
    """torch pins cuda-toolkit to the minor version. An upper bound here would select an older torch."""
    (toolkit,) = map(Requirement, PROJECT["project"]["optional-dependencies"]["cuda"])
    assert all(bound.operator == ">=" for bound in toolkit.specifier)


@pytest.mark.parametrize(
    ("torch_cuda", "needed"), [("13.0", "nvcc of CUDA 13 is found"), (None, "with a CUDA build of torch, is found")]
)
def test_the_report_names_the_compiler_that_is_missing(monkeypatch, torch_cuda, needed):
    monkeypatch.setitem(rk.backends.__globals__["_problems"], "cuda", "not built: build it")
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert rk.backends()["cuda"].reason.endswith(needed)


def test_the_description_for_an_index_leads_nowhere_in_the_tree(build):
    """An index shows neither the tree's pictures nor its files."""
    description = build.description()
    assert not re.search(r"\]\((?!https?:)", description)
    readme = (ROOT / "README.md").read_text()
    assert re.findall("^## .*", description, re.MULTILINE) == re.findall("^## .*", readme, re.MULTILINE)
    assert re.findall(r"```.*?```", description, re.DOTALL) == re.findall(r"```.*?```", readme, re.DOTALL)
