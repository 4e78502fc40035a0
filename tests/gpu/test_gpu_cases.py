"""Random calls on every backend of a GPU (tests/cases.py, tests/oracle.py)."""

from __future__ import annotations

import pytest
import torch

import rkl_kernels as rk

pytest.importorskip("hypothesis", reason="make gpu takes the machine's own packages; hypothesis is not among them")

from cases import Case, cases, examples
from hypothesis import given
from oracle import Rules, check


@pytest.fixture(autouse=True)
def _float32_products():
    """No TF32, and float32 sums in the library's products. The bounds assume both."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


def check_on(backend: str, device: str, case: Case) -> None:
    if backend not in (("cuda", "triton") if device == "cuda" else ("cpu",)) or not rk.backends()[backend].available:
        pytest.skip(f"{backend} serves no {device} tensors here")

    def serve(tensors, grad):
        there = [t if t is None else moved(t, device) for t in tensors]
        with rk.use_backend(backend):
            results = case.run(rk, there, None if grad is None else moved(grad, device))
        return [r.cpu() for r in results]

    sixteen = case.dtype != torch.float32
    tanh = 2.0**-11 if sixteen and backend == "cuda" else 2.0**-22
    flushes = parts = device == "cpu" and case.dtype == torch.bfloat16
    check(case, Rules(case.dtype, flushes, tanh, parts, (8 if sixteen else 1) * (device == "cuda")), backend, serve)


def moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on the device, with its strides, gaps and offset."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage()).to(device)
    view = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    return view.requires_grad_(x.requires_grad)


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
@examples(0.05)
@given(case=cases("trelu"))
def test_trelu(device, backend, case):
    check_on(backend, device, case)


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
@examples(0.1)
@given(case=cases("depthwise"))
def test_depthwise(device, backend, case):
    check_on(backend, device, case)


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
@examples(0.1)
@given(case=cases("separable"))
def test_separable(device, backend, case):
    check_on(backend, device, case)
