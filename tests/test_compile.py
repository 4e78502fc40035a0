"""torch.compile of every operator: whole graphs, any batch, forward and backward. Also for a GPU that is not there."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rkl_kernels as rk
from rkl_kernels import _backends as backends

W, P = torch.randn(3, 1, 3, 3), torch.randn(4, 3, 1, 1)

CALLS = {
    "trelu": lambda library, x: library.trelu(x) + 1,
    "trelu in place": lambda library, x: library.trelu(x * 2, inplace=True),
    "depthwise": lambda library, x: library.depthwise_conv2d(x, W, padding="same", dilation=2),
    "separable": lambda library, x: library.separable_conv2d(x, W, P, inner_activation="silu", activation="gelu"),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_inductor_whole_graph_any_batch(call):
    compiled = torch.compile(lambda x: call(rk, x), fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 5):
            results = []
            for function in (compiled, lambda x: call(rk.reference, x)):
                x = torch.randn(batch, 3, 9, 8, generator=torch.Generator().manual_seed(batch)).requires_grad_()
                y = function(x)
                results.append((y, *torch.autograd.grad(y.square().sum(), x)))
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_choice_of_backend_is_seen_by_the_compiler():
    """The choice counts around the compiled call and within it, also where it has changed since compilation."""
    kinds = []

    def count(graph, inputs):
        kinds.append("rkl" if any("rkl" in str(node.target) for node in graph.graph.nodes) else "aten")
        return graph.forward

    compiled = torch.compile(rk.trelu, fullgraph=True, backend=count)
    x = torch.randn(3, 4)
    compiled(x)
    with rk.use_backend("reference"):
        compiled(x)
    compiled(x)

    @torch.compile(fullgraph=True, backend=count)
    def within(x):
        with rk.use_backend("reference"):
            return rk.trelu(x)

    within(x)
    assert kinds == ["rkl", "aten", "aten"]


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))])
def test_function_transforms_within(transform):
    x = torch.randn(2, 3, 5, 5)
    results = [
        torch.compile(transform(lambda q, lib=lib: lib.depthwise_conv2d(q, W).square().sum()), fullgraph=True,
                      backend="aot_eager")(x)
        for lib in (rk, rk.reference)
    ]  # fmt: skip
    torch.testing.assert_close(*results)


def test_forward_mode_after_a_plain_call():
    """The graph of a plain call has no tangents and must not be reused for dual numbers."""
    compiled = torch.compile(rk.trelu, backend="aot_eager")
    x = torch.randn(5)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), rk.reference.trelu(x))
        with fwad.dual_level():
            ours, theirs = (fwad.unpack_dual(f(fwad.make_dual(x, x + 1))) for f in (compiled, rk.reference.trelu))
            torch.testing.assert_close(ours.tangent, theirs.tangent)


def test_direct_in_place_operator_compiles():
    def function(x):
        y = x * 2
        torch.ops.rkl.trelu_(y)
        return y

    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), rk.reference.trelu(x * 2))


def test_gradient_of_the_direct_in_place_operator_on_a_graphs_input():
    def function(x):
        torch.ops.rkl.trelu_(x)
        return x + 1

    x, results = torch.randn(3, 4, requires_grad=True), []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        written = x * 2
        y = call(written)
        results.append((y, written, *torch.autograd.grad((y * written).sum(), x)))
    torch.testing.assert_close(*results)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Choose backends as on a GPU that has both, where the first lacks one operator."""
    available = {"cuda": True, "triton": True, "reference": True, "cpu": True}
    monkeypatch.setattr(backends, "status", lambda name: backends.Status(available[name], "as if"))
    monkeypatch.setattr(backends, "_age_refusal", lambda gpu: None)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # the true answer for operators of others

    def as_if(name: str, key: str) -> bool:
        if name.startswith("rkl::") and key == "CUDA":
            return name != "rkl::separable_conv2d"
        return has_kernel(name, key)

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", as_if)
    backends._decision.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode
    backends._decision.cache_clear()


class Net(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.depthwise = rk.DepthwiseConv2d(3, 3, device=device)
        self.separable = rk.SeparableConv2d(3, 4, 3, device=device, activation="trelu")
        self.act = rk.TReLU()

    def forward(self, x):
        return self.act(self.separable(self.depthwise(x)))


def test_choice_for_a_gpu_is_traced(fake_gpu):
    targets = []

    def look(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("rkl"))
        return graph.forward

    net = torch.compile(Net("cuda"), fullgraph=True, dynamic=True, backend=look)
    y = net(torch.empty(2, 3, 9, 9, device="cuda"))
    assert y.device.type == "cuda"
    assert targets == ["rkl.depthwise_conv2d.default", "rkl_triton.separable_conv2d.default", "rkl.trelu.default"]


def test_order_of_backends_on_a_gpu(fake_gpu):
    """CUDA C++ comes first. Triton serves what it lacks, and the reference serves what neither does."""
    image = torch.empty(1, 3, 5, 5, device="cuda")
    assert backends.choose("depthwise_conv2d", image) == "cuda"
    assert backends.choose("separable_conv2d", image) == "triton"
    assert backends.choose("separable_conv2d", image.double()) == "reference"


def test_export_for_a_gpu(fake_gpu):
    program = torch.export.export(Net("cuda"), (torch.empty(2, 3, 9, 9, device="cuda"),), strict=True)
    assert "torch.ops.rkl_triton.separable_conv2d.default" in program.graph_module.code


@pytest.mark.parametrize("bias", [False, True])
def test_the_backward_of_a_plain_call_compiles(bias):
    """Compiled autograd does not follow the call itself, only what the call left for the backward."""
    layer, x = nn.Conv2d(6, 6, 3, groups=6, bias=bias), torch.randn(2, 6, 9, 8)
    gradients = []
    for swap in (lambda layer: None, rk.convert):
        swap(layer)
        layer.zero_grad()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            layer(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_reduce_overhead_mode_of_a_layer():
    """CUDA graphs are for GPUs. On a CPU the mode must do no harm."""
    layer = rk.SeparableConv2d(3, 4, 3)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(torch.compile(layer, mode="reduce-overhead", fullgraph=True)(x), layer(x))
