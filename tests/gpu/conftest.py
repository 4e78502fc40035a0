"""Tests for a machine with a GPU: ``make gpu``, or ``pytest tests/gpu --device cuda``. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the tests themselves")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name = request.config.getoption("--device", "cuda")  # the option is unknown where tests/ runs as a whole
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    return name
