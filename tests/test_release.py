"""The checks before a wheel is uploaded pass for the right archives alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.installed import Outcome, core_tests, environment, only
from tools.release import ALSO, BINARIES, sdist_faults, wheel_faults

RUN = "results/a/runs/a/resnet/seed-0"
RECORDS = {"results/README.md", "results/a/table5-a.json", f"{RUN}/config.yaml", f"{RUN}/log.jsonl"}
TRACKED = {"rkl/cli.py", "rkl_kernels/py.typed", "csrc/ops.cpp", "tests/conftest.py", *RECORDS, *ALSO}
WHEEL = {"rkl/", "rkl/cli.py", "rkl_kernels/py.typed", "resnet_kl-1.dist-info/METADATA", *BINARIES}
SDIST = TRACKED | {"PKG-INFO", "setup.cfg", "resnet_kl.egg-info/SOURCES.txt"}


def test_archives_that_hold_what_they_should():
    assert wheel_faults(WHEEL, TRACKED) == []
    assert sdist_faults(SDIST, TRACKED) == []


def test_names_what_is_missing_and_what_is_too_much():
    wheel = WHEEL - {"rkl_kernels/_C_cuda.abi3.so"} | {"rkl_kernels/gone.py", "resnet_kl.libs/libcudart.so.13"}
    assert wheel_faults(wheel, TRACKED) == [
        "the wheel lacks rkl_kernels/_C_cuda.abi3.so",
        "the wheel must not hold resnet_kl.libs/libcudart.so.13",
        "the wheel must not hold rkl_kernels/gone.py",
    ]
    sdist = SDIST - {"csrc/ops.cpp", "results/a/table5-a.json"} | {"runs/digits/log.jsonl"}
    assert sdist_faults(sdist, TRACKED) == [
        "the source distribution lacks csrc/ops.cpp",
        "the source distribution lacks results/a/table5-a.json",
        "the source distribution must not hold runs/digits/log.jsonl",
    ]


def test_one_archive_of_a_kind(tmp_path):
    with pytest.raises(SystemExit, match=r"must hold one \*.whl, got 0; run make wheel"):
        only(tmp_path, "*.whl")
    (tmp_path / "a.whl").touch()
    assert only(tmp_path, "*.whl") == tmp_path / "a.whl"


# Tests of a made-up package: one passes, one fails, and one ends pytest with status 0 before pytest reports.
@pytest.mark.parametrize(
    ("body", "green"), [("assert True", True), ("assert False", False), ("raise SystemExit(0)", False)]
)
def test_core_tests_are_green_where_tests_passed(tmp_path, monkeypatch, body, green):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(f"import os\ndef test_it():\n    {body}\n")
    monkeypatch.setattr("tools.installed.CORE", ["test_it.py"])
    assert core_tests(sys.executable, tmp_path, tmp_path / "run").green is green


def test_core_tests_that_did_not_run_are_not_green(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr("tools.installed.CORE", ["test_gone.py"])
    assert not core_tests(sys.executable, tmp_path, tmp_path / "run").green
    assert not Outcome("3 passed, 1 error", ("ERROR test_it.py",)).green


def test_names_a_python_that_is_not_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    with pytest.raises(RuntimeError, match=r"^no Python 3\.99 on this machine"):
        environment(tmp_path / "venv", "3.99")


@pytest.mark.parametrize("program", ["tools.release", "tools.corners"])
def test_programs_say_what_they_need(tmp_path, program):
    done = subprocess.run([sys.executable, "-m", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("run make wheel")
