"""The means of a benchmark's record by kind of layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench_rows import TINY, row_of

from benchmarks import kinds, suite
from benchmarks.shapes import SHAPES

FACTS = {"device": "A CPU", "cores": 2, "threads": 2, "isa": "AVX2", "torch": "2.13", "python": "3.11"}


def run_of(**seconds: float) -> suite.Run:
    """Rows of the depthwise forward: one for each layer's name, with ours in 1 s and PyTorch in the given seconds."""
    rows = [
        row_of(replace(TINY, operator="depthwise", name=name.replace("_", "-")), ours_nchw=1.0, eager_nchw=taken)
        for name, taken in seconds.items()
    ]
    return suite.Run(FACTS, rows=rows)


def test_means_lowest_and_rows_below_one_by_kind() -> None:
    run = run_of(mnv2_56=2.0, mnv2_7=8.0, kb_82=3.0, rkl_8_k3=0.5, rkl_4_k3=2.0)
    found = {line[0]: line[1:] for line in kinds.lines(run)}
    assert found == {
        "depthwise forward, layers of published models": ["2", "4.00, -", "-, -", "4.00 (2.00; none)", "-", "-, -"],
        "depthwise forward, KernelBench's": ["1", "3.00, -", "-, -", "3.00 (3.00; none)", "-", "-, -"],
        "depthwise forward, ResNet-KL's": ["2", "1.00, -", "-, -", "1.00 (0.50; 1)", "-", "-, -"],
        "depthwise forward, all": ["5", "2.17, -", "-, -", "2.17 (0.50; 1)", "-", "-, -"],
    }


def test_a_shape_is_of_one_kind() -> None:
    parts = [kinds.names_of(kind) for kind in kinds.KINDS if kind != kinds.ALL]
    assert sorted(name for part in parts for name in part) == sorted(kinds.names_of(kinds.ALL))
    assert kinds.names_of(kinds.ALL) == {shape.id for shape in SHAPES}
    models = {shape.source for shape in SHAPES if shape.id in kinds.names_of(kinds.PUBLISHED)}
    assert models == {"MobileNetV1", "MobileNetV2", "Xception", "MNasNet", "ConvNeXt-T", "RepLKNet", "DeepLabv3+"}

    (one, every) = kinds.lines(run_of(one_112=2.0))
    assert (one[:2], every[:2]) == (["depthwise forward, one small image", "1"], ["depthwise forward, all", "1"])


def test_a_table_is_printed(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "run.json"
    run_of(mnv2_56=2.0).save(path)
    assert kinds.main([str(path)]) == 0
    assert "| depthwise forward, all | 1 | 2.00, - |" in capsys.readouterr().out


def test_a_file_that_is_no_record_is_refused(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        kinds.main([str(tmp_path / "none.json")])
    assert "FILE.json must be the record of a run" in capsys.readouterr().err
