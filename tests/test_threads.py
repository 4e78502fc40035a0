"""Settings hold for the thread that made them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

import rkl_kernels as rk

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
