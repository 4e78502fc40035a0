"""The programs in examples/ run and reach the results that they promise."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """The main function of an example."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: importlib.import_module(name).main


def test_every_example_is_here():
    tested = {"convert_and_finetune", "new_model", "distill_torchvision", "export_onnx"}
    assert {file.stem for file in FOLDER.glob("*.py")} == tested


@pytest.mark.parametrize("name", ["convert_and_finetune", "new_model"])
def test_training(example, name):
    pytest.importorskip("torchvision", reason="extra [train] not installed")
    assert example(name)() > 0.8


def test_distillation(example):
    pytest.importorskip("torchvision", reason="extra [train] not installed")
    before, after = example("distill_torchvision")()
    assert after < 0.5 * before


def test_export(example, tmp_path):
    pytest.importorskip("torchvision", reason="extra [train] not installed")
    pytest.importorskip("onnxruntime", reason="extra [export] not installed")
    pytest.importorskip("onnxscript", reason="extra [export] not installed")
    assert example("export_onnx")(str(tmp_path / "model.onnx")) < 1e-4
