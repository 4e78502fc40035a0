"""Settings hold for the thread that made them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

import rkl_kernels as rk
from rkl_kernels import fusion

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


def test_another_thread_has_the_planners_choice():
    with fusion.use_fusion(True), ThreadPoolExecutor(1) as pool:
        assert fusion.overruled() is True
        assert pool.submit(fusion.overruled).result() is None


def test_a_backward_in_another_thread_obeys_its_forward(monkeypatch):
    """As on a GPU, where autograd has threads of its own."""
    seen = []
    x, w, p = X.clone().requires_grad_(), torch.randn(3, 1, 3, 3), torch.randn(4, 3, 1, 1)
    with fusion.use_fusion(False):
        y = rk.separable_conv2d(x, w, p)
    real = fusion.use_fusion
    monkeypatch.setattr(fusion, "use_fusion", lambda fused: seen.append(fused) or real(fused))
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert seen == [False]
    assert x.grad is not None


def test_settings_are_undone_after_an_error():
    try:
        with rk.use_backend("reference"), fusion.use_fusion(True):
            raise KeyError
    except KeyError:
        pass
    assert rk.explain("trelu", X).backend == "cpu"
    assert fusion.overruled() is None
