"""The page of models: what it says of itself is true of its table."""

from __future__ import annotations

import re

from benchmarks import model_matrix


def test_a_drawn_model_that_failed_counts_as_drawn() -> None:
    names = ["torchvision mobilenet_v2", f"timm {model_matrix.TIMM[0]}", "timm drawn", "timm another"]
    failed = ["torchvision large", f"timm {model_matrix.TIMM[1]}", "timm third"]
    told = "\n".join(model_matrix.introduction(names, failed))
    assert "3 were drawn, and 2 of them ran." in told


def test_the_committed_page_tells_its_own_numbers() -> None:
    page = model_matrix.PAGE.read_text()
    names = re.findall(r"^\| ((?:torchvision|timm) \S+) \|", page, re.MULTILINE)
    failed = re.findall(r"^- (\S+ \S+): ", page.partition("Not run:")[2], re.MULTILINE)
    assert len(names) > len(failed) > 0
    told = "\n".join(model_matrix.introduction(names, failed))
    assert page.startswith(told)
    assert f" {model_matrix.DRAWN} were drawn" in told
