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
