"""The documentation builds without a warning, its Python code runs, and the commands in it exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rkl_kernels as rk

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "docs/api/rkl.md", "results/README.md", "benchmarks/README.md")]
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
PROGRAM = re.compile(r"\brkl [a-z]+\b|-m benchmarks\.\w+")


def _blocks(page: Path, language: str) -> str:
    """The code blocks of one language, one after another."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))


def _commands() -> list[list[str]]:
    """Every ``rkl`` command in the pages' code blocks."""
    lines = [line for page in PAGES + OTHERS for line in _blocks(page, "").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("rkl ")]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. mkdocs.yml makes broken links and anchors warnings, and ``--strict`` makes warnings errors."""
    pytest.importorskip("material", reason="extra [docs] not installed")
    pytest.importorskip("mkdocstrings", reason="extra [docs] not installed")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


@pytest.mark.xdist_group("docs")
def test_pages_from_elsewhere_are_in_the_site(site):
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {"index.html", "CONTRIBUTING.html", "CHANGELOG.html", "benchmarks/index.html"} <= pages


@pytest.mark.xdist_group("docs")
def test_every_public_name_stands_once_in_the_api_pages(site):
    """Some modules have the name of a function. A page of such a module would list all of it, not just the function."""
    pages = [page.read_text() for page in (site / "api").glob("*.html") if page.stem != "reference"]
    shown = [name for page in pages for name in re.findall(r'<h\d id="rkl_kernels\.(?:\w+\.)?(\w+)"', page)]
    assert sorted(shown) == sorted(set(rk.__all__) - {"reference"})


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "python")], ids=lambda page: page.name)
def test_python_in_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="extra [train] not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(_blocks(page, "python"), page.name, "exec"), {})


@pytest.mark.parametrize("command", _commands(), ids=" ".join)
def test_commands_in_the_pages_are_understood(command):
    pytest.importorskip("tyro", reason="extra [train] not installed")
    from rkl import cli
    from rkl.terminal import parse
    from rkl.train_options import read_options

    name, *arguments = command
    assert name in cli.COMMANDS
    if name == "train":
        read_options(arguments)
    else:
        parse(getattr(cli, name.title()), arguments)


def _code() -> list[str]:
    """The code that may name our options: in the pages' blocks and lines, and in the Makefile."""
    blocks = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    found = (ROOT / "Makefile").read_text().replace("\\\n", "").splitlines()
    for page in PAGES + OTHERS:
        text = page.read_text()
        found += [line for block in blocks.findall(text) for line in block.splitlines()]
        found += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", blocks.sub("", text))]
    return [code for code in found if PROGRAM.search(code) or code.startswith("--")]


def _options_of_rkl() -> dict[str, set[str]]:
    """The options of every command, by its help."""
    from rkl import cli

    found = {}
    for name in cli.COMMANDS:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
            cli.main([name, "--help"])
        found[f"rkl {name}"] = set(OPTION.findall(said.getvalue()))
    return found


def test_options_in_the_pages_are_there():
    """Those of a command that is named beside them, or else of any: a span may show an option alone."""
    pytest.importorskip("tyro", reason="extra [train] not installed")
    options = _options_of_rkl()
    for file in (ROOT / "benchmarks").glob("*.py"):
        options[f"-m benchmarks.{file.stem}"] = set(re.findall(r'"(--[\w-]+)"', file.read_text()))
    every = set().union(*options.values())
    code = _code()
    assert len(code) > 80
    for words in code:
        program = PROGRAM.search(words)
        assert set(OPTION.findall(words)) <= (options.get(program[0], set()) if program else every), words


def test_tests_that_the_pages_name_are_there():
    files = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    there = files.keys() | {name for text in files.values() for name in re.findall(r"def (test_\w+)\(", text)}
    named = {
        name for page in PAGES for name in re.findall(r"`(?:tests/)?(?:\w+/)*(test_\w+)(?:\.py)?`", page.read_text())
    }
    assert len(named) > 50
    assert named - there == set()


def test_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == rk.__version__
