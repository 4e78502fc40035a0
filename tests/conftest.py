"""Shared fixtures."""

from __future__ import annotations

import pytest
import torch

import rkl_kernels as rk


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Every backend that serves CPU tensors, in turn."""
    assert rk.backends()[request.param].available, rk.backends()[request.param].reason
    with rk.use_backend(request.param):
        yield request.param


@pytest.fixture
def one_thread():
    """Layers this small take longer to share among threads than to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
