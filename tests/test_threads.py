"""Threads and processes: settings hold for the thread that made them, and results are the same for any number."""

from __future__ import annotations

import io
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from cases import Case, cases, examples
from chains import X as IMAGE
from chains import chain
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rkl_kernels as rk
from rkl_kernels._checks import ArgumentError, ArgumentTypeError

X = torch.randn(2, 3, 5, 5)
THREADS = 8


def test_eight_threads_with_different_backends():
    together = threading.Barrier(THREADS)
    names = ["cpu", "reference"] * (THREADS // 2)

    def serve(name: str) -> set[str]:
        with rk.use_backend(name):
            together.wait()
            seen = set()
            for _ in range(50):
                rk.trelu(X)
                seen.add(rk.explain("trelu", X).backend)
            together.wait()
        return seen

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(serve, names)) == [{name} for name in names]
    assert rk.explain("trelu", X).backend == "cpu"


def test_settings_are_undone_after_an_error():
    try:
        with rk.use_backend("reference"):
            raise KeyError
    except KeyError:
        pass
    assert rk.explain("trelu", X).backend == "cpu"


def called(model: nn.Module, done: threading.Event) -> int:
    """Call a model until another thread is done, and return how often. Each call must give the same."""
    calls = 0
    with torch.no_grad():
        expected = model(IMAGE)
        while not done.is_set() or not calls:
            assert torch.equal(model(IMAGE), expected)
            calls += 1
    return calls


def test_models_are_called_while_another_is_fused():
    done = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        calls = pool.submit(called, chain(nn.ReLU()), done)
        try:
            for _ in range(20):
                assert rk.fuse_for_inference(chain(nn.ReLU())).fusion_report.fused
        finally:
            done.set()
        assert calls.result() > 0


def test_models_are_called_while_a_fused_one_is_loaded():
    """Loading traces the model's code anew by torch.fx."""
    file, done = io.BytesIO(), threading.Event()
    torch.save(rk.fuse_for_inference(nn.Sequential(*chain(nn.ReLU()), *(nn.Tanh() for _ in range(50)))), file)
    with ThreadPoolExecutor(THREADS) as pool:
        calls = pool.submit(called, chain(nn.ReLU()), done)
        try:
            for loaded in pool.map(
                lambda data: torch.load(io.BytesIO(data), weights_only=False), [file.getvalue()] * 40
            ):
                assert loaded.fusion_report.fused
        finally:
            done.set()
        assert calls.result() > 0


def test_models_are_fused_at_once():
    """torch.fx replaces methods of torch while it traces. They are in their places afterwards."""
    methods = nn.Module.__call__, nn.Module.__getattr__
    models = [nn.Sequential(chain(nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Tanh())) for _ in range(20)]
    with ThreadPoolExecutor(THREADS) as pool:
        reports = {str(fused.fusion_report) for fused in pool.map(rk.fuse_for_inference, models)}
    assert (nn.Module.__call__, nn.Module.__getattr__) == methods
    assert reports == {"chains fused: 1, of 4 layers"}


def results(case: Case) -> list[Tensor]:
    """A case's results, or none where the rules refuse its arguments. An error from a kernel is a failure."""
    with rk.use_backend("cpu"), suppress(ArgumentError, ArgumentTypeError):
        return case.run(rk, *case.make())
    return []


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(a, b, strict=True)
    )


@examples(0.1)
@given(st.one_of(cases("depthwise"), cases("separable")))
def test_same_bits_for_any_number_of_threads(case):
    # Where a gradient is wanted, the last silu or gelu is PyTorch's, which rounds differently where a thread's share
    # ends. So compare all that comes before it.
    if any(case.wanted) and case.activations[1:] in (("silu",), ("gelu",)):
        case = replace(case, activations=(case.activations[0], None))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(results(case))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(found[0], other) for other in found[1:]), case.program("cpu")


CALLS = {
    "trelu": (rk.trelu, [(4, 8, 30, 31)]),
    "depthwise": (lambda x, w, b: rk.depthwise_conv2d(x, w, b, 1, 1), [(4, 24, 30, 31), (24, 1, 3, 3), (24,)]),
    "separable": (
        lambda x, d, p: rk.separable_conv2d(x, d, p, padding=1, inner_activation="silu", activation="trelu"),
        [(4, 24, 30, 31), (24, 1, 3, 3), (40, 24, 1, 1)],
    ),
}


def step(name: str) -> list[Tensor]:
    """Output and gradients of one call on tensors that are always the same."""
    function, shapes = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def test_eight_threads_at_once():
    work = list(CALLS) * 20
    expected = {name: step(name) for name in CALLS}
    with ThreadPoolExecutor(8) as pool:
        for name, found in zip(work, pool.map(step, work), strict=True):
            assert same_bits(found, expected[name]), name


def test_several_processes():
    work = list(CALLS) * 2
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        for name, found in zip(work, pool.map(step, work), strict=True):
            assert same_bits(found, step(name)), name


def is_same_in_fork(name: str) -> bool:
    """Whether a forked child of one thread, like a DataLoader's worker, gets the same, as with PyTorch's operators."""
    torch.set_num_threads(2)
    expected, context = step(name), multiprocessing.get_context("fork")

    def child() -> None:
        torch.set_num_threads(1)
        os._exit(0 if same_bits(step(name), expected) else 1)

    process = context.Process(target=child)
    process.start()
    process.join(60)
    return process.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_use():
    # In a separate process: PyTorch refuses a backward in the fork of a process where autograd has started threads, and
    # the compiler's tests start some.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert all(pool.map(is_same_in_fork, CALLS))
