"""The operators on a GPU under PyTorch's own features: compilers, transforms, devices, memory, threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import rkl_kernels as rk


@pytest.fixture
def gpu(device):
    if device == "cpu":
        pytest.skip("of GPUs only")
    return device


def net(device: str) -> nn.Module:
    return nn.Sequential(
        rk.DepthwiseConv2d(16, 3, padding=1), rk.TReLU(), rk.SeparableConv2d(16, 24, 5, activation="trelu")
    ).to(device)


def test_import_initialises_nothing(gpu):
    code = "import rkl_kernels, torch; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_forked_workers_live(gpu):
    code = """
import os, torch, rkl_kernels as rk
pid = os.fork()
y = rk.trelu(torch.ones(3, device="cuda"))
if pid == 0:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_whole(device, mode):
    torch.compiler.reset()
    model = net(device)
    compiled = torch.compile(model, fullgraph=True, mode=mode, dynamic=False)
    for _ in range(3):  # CUDA graphs are recorded on the second call
        x = torch.randn(4, 16, 12, 12, device=device, requires_grad=True)
        y, z = compiled(x), model(x)
        torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-4)
        ours, theirs = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, z))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_compiles_for_any_batch(device):
    torch.compiler.reset()
    model = net(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 5):
            x = torch.randn(batch, 16, 12, 12, device=device)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)


def test_transforms(device):
    x, t, w = (torch.randn(s, device=device) for s in ((2, 3, 6, 6), (2, 3, 6, 6), (3, 1, 3, 3)))
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (t,)),
        lambda f: torch.func.grad(lambda q: f(q).square().sum())(x),
        lambda f: torch.vmap(f)(x[:, None]),
    ):
        ours, theirs = (transform(lambda q, lib=lib: lib.depthwise_conv2d(q, w)) for lib in (rk, rk.reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_no_memory_has_its_type(gpu):
    x = torch.zeros(1, 1, 1, 1, device=gpu).expand(1, 4, 1 << 20, 1 << 20)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        rk.trelu(x)


def test_backward_runs_on_the_backend_of_its_forward(gpu):
    """Autograd runs it in another thread, where ``use_backend`` has no effect."""
    if not all(rk.backends()[name].available for name in ("cuda", "triton")):
        pytest.skip("wants both backends of a GPU")
    shapes = (2, 32, 12, 12), (32, 1, 3, 3), (32, 32, 1, 1)
    leaves = [torch.randn(shape, device=gpu, requires_grad=True) for shape in shapes]
    kernels = []
    for backend in ("cuda", "triton"):
        with rk.use_backend(backend):
            y = rk.separable_conv2d(*leaves)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            y.sum().backward()
            torch.cuda.synchronize()
        kernels.append({event.key for event in profile.key_averages()})
    assert [any("_window_kernel" in name for name in names) for names in kernels] == [False, True]


def test_another_device_than_the_current_one(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    x = torch.randn(2, 16, 12, 12, device="cuda:1")
    model = net("cuda:1")
    with torch.cuda.device(0):
        torch.testing.assert_close(model(x), model.cpu()(x.cpu()).to("cuda:1"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_in_float32(device, dtype):
    """The library's products also sum in float32, where PyTorch's flags ask for it. Each sum has 4096 terms of 2^-9."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction
    flags.allow_fp16_reduced_precision_reduction = flags.allow_bf16_reduced_precision_reduction = False
    try:
        channels = 4096
        x = torch.ones(1, channels, 8, 8, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.ones(channels, 1, 1, 1, device=device, dtype=dtype)
        p = torch.full((16, channels, 1, 1), 2.0**-9, device=device, dtype=dtype)
        assert torch.equal(rk.separable_conv2d(x, w, p), torch.full((1, 16, 8, 8), 8.0, device=device, dtype=dtype))
    finally:
        flags.allow_fp16_reduced_precision_reduction, flags.allow_bf16_reduced_precision_reduction = before
