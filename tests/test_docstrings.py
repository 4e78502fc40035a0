"""The examples in docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch
from torch import nn

import rkl_kernels as rk

RKL = ("rkl.distill", "rkl.network.model")
"""The modules of ``rkl`` that Python programs call. The others serve its command line."""

ASSUMED = {"torch": torch, "nn": nn, "rk": rk}
"""The names that the examples use without an import."""


def _modules() -> list[str]:
    """The modules of ``rkl_kernels``, private ones too, since they may define public names.

    Triton's modules are left out because they need Triton, and the benchmark's because they take time.
    """
    left = ("triton", "bench", "__main__")
    names = [info.name for info in pkgutil.iter_modules(rk.__path__) if info.name not in left]
    return ["rkl_kernels", *(f"rkl_kernels.{name}" for name in names if not name.startswith("_C"))]


def _module(name: str) -> ModuleType:
    if name.startswith("rkl."):
        pytest.importorskip("torchvision", reason="extra [train] not installed")
    return importlib.import_module(name)


def _own(module: ModuleType) -> dict[str, object]:
    """The public functions and classes that a module defines."""
    return {
        f"{module.__name__}.{name}": value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    }


def _examples(value: object) -> int:
    """The number of examples in a docstring."""
    return len(doctest.DocTestParser().get_examples(inspect.getdoc(value) or ""))


@pytest.mark.parametrize("name", [*_modules(), *RKL, "rkl.slimming.early_exit"])
def test_examples_run(name):
    module = _module(name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    said: list[str] = []
    for example in finder.find(module, extraglobs=ASSUMED):
        torch.manual_seed(0)
        runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)


def test_every_public_name_has_an_example():
    public = {name: getattr(rk, name) for name in rk.__all__ if not inspect.ismodule(getattr(rk, name))}
    public |= _own(rk.reference)
    assert [name for name, value in public.items() if not _examples(value)] == []
    assert {value.__module__ for value in public.values()} <= set(_modules())


@pytest.mark.parametrize("name", RKL)
def test_every_public_name_of_rkl_has_an_example(name):
    assert [path for path, value in _own(_module(name)).items() if not _examples(value)] == []
