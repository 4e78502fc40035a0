"""GPUs that no kernel is compiled for: PyTorch's own operators serve them, and the status of a backend says so."""

from __future__ import annotations

import pytest
import torch

import rkl_kernels as rk
from rkl_kernels import _backends

TURING, HOPPER = (7, 5), (9, 0)
WHY = "it serves GPUs of compute capability 8.0 and newer, got 7.5"


@pytest.fixture
def gpus(monkeypatch):
    """Make torch report GPUs of these compute capabilities."""
    monkeypatch.setitem(_backends._problems, "cuda", None)
    monkeypatch.setattr(_backends, "_BUILT", frozenset({"cpu", "cuda"}))

    def tell(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index or 0])
        _backends._is_built_for.cache_clear()

    yield tell
    _backends._is_built_for.cache_clear()


def refusal(backend, index):
    return _backends.refusal(backend, "trelu", torch.device("cuda", index), torch.float32)


def test_an_old_gpu_alone(gpus):
    gpus(TURING)
    assert rk.backends()["cuda"] == _backends.Status(False, WHY)
    assert refusal("cuda", 0) == WHY
    assert not _backends._is_built_for(torch.device("cuda", 0))
    assert _backends._is_built_for(torch.device("cpu"))


@pytest.mark.skipif(_backends.INTERPRETED, reason="interpreted, Triton's kernels serve the CPU")
def test_triton_on_an_old_gpu(gpus):
    gpus(TURING)
    assert not rk.backends()["triton"].available
    gpus(TURING, HOPPER)
    assert rk.backends()["triton"].available
    assert refusal("triton", 0) == WHY
    assert refusal("triton", 1) is None


def test_an_old_gpu_beside_a_new_one(gpus):
    gpus(TURING, HOPPER)
    assert rk.backends()["cuda"].available
    assert [_backends._is_built_for(torch.device("cuda", i)) for i in (0, 1)] == [False, True]
