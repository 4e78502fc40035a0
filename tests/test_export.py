"""torch.export, its files, AOTInductor packages and ONNX, each read back and run. DTensor."""

from __future__ import annotations

import forks
import pytest
import torch
from chains import Flagged, X
from torch import nn

import rkl_kernels as rk

BATCH = ({0: torch.export.Dim("batch", min=2)},)


class Net(nn.Module):
    """Has every operator, every kind of activation, and a window that is not square."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = rk.DepthwiseConv2d(4, (3, 5), padding="same")
        self.first = rk.SeparableConv2d(4, 6, 3, stride=(2, 1), inner_activation="relu6", activation="gelu")
        self.second = rk.SeparableConv2d(6, 6, 3, padding=1, depthwise_bias=True, inner_activation="trelu", bias=False)
        self.act = rk.TReLU()

    def forward(self, x):
        return self.act(self.second(self.first(self.depthwise(x))))


def example(batch: int) -> torch.Tensor:
    return torch.randn(batch, 4, 10, 12)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_for_any_batch(strict):
    net = Net()
    program = torch.export.export(net, (example(2),), dynamic_shapes=BATCH, strict=strict)
    assert "torch.ops.rkl.separable_conv2d.default" in program.graph_module.code
    for batch in (2, 7):
        x = example(batch)
        torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_gradient_of_an_exported_program(activation, fused, mode):
    """Also for a program exported without gradients, and for a fused copy, whose filters have no gradient."""
    net = nn.Sequential(rk.SeparableConv2d(4, 6, 3, activation=activation))
    net = rk.fuse_for_inference(net) if fused else net
    with mode():
        program = torch.export.export(net, (example(2),)).module()
    x = example(2).requires_grad_()
    ours, theirs = (torch.autograd.grad(function(x).square().sum(), x) for function in (program, net))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_a_fused_copy_that_keeps_the_models_code(strict):
    fused = rk.fuse_for_inference(Flagged().eval())
    program = torch.export.export(fused, (X,), strict=strict)
    torch.testing.assert_close(program.module()(X), fused(X))


def test_saved_program_needs_the_import_and_nothing_else(tmp_path):
    net, x, file = Net(), example(2), tmp_path / "net.pt2"
    torch.export.save(torch.export.export(net, (x,)), file)
    torch.save((x, net(x).detach()), tmp_path / "expected.pt")
    code = """
import sys, torch
{}
x, y = torch.load(sys.argv[1] + "/expected.pt")
torch.testing.assert_close(torch.export.load(sys.argv[1] + "/net.pt2").module()(x), y)
"""
    runs = [forks.run(code.format(line), str(tmp_path)) for line in ("import rkl_kernels", "")]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[1].returncode != 0


def test_onnx_as_it_is(tmp_path):
    """The file has standard operators alone, and ONNX Runtime computes the same numbers."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="extra [bench] not installed")
    pytest.importorskip("onnxscript", reason="extra [bench] not installed")
    net, file = Net().eval(), tmp_path / "net.onnx"
    program = torch.onnx.export(net, (example(2),), dynamo=True, dynamic_shapes=BATCH, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
    kinds = [node.op_type for node in program.model.graph]
    assert kinds.count("Conv") == 5
    program.save(str(file), external_data=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        x = example(batch)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_onnx_of_an_exported_program():
    pytest.importorskip("onnxscript", reason="extra [bench] not installed")
    exported = torch.export.export(Net().eval(), (example(2),))
    program = torch.onnx.export(exported, dynamo=True, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}


def test_aot_inductor_package(tmp_path):
    net = Net().eval()
    exported = torch.export.export(net, (example(2),), dynamic_shapes=BATCH)
    file = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "net.pt2"))
    loaded = torch._inductor.aoti_load_package(file)
    for batch in (2, 3):
        x = example(batch)
        torch.testing.assert_close(loaded(x), net(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="torch 2.11 does not take convolutions apart for DTensor; 2.12 does"
)
def test_sharded_by_batch_as_pytorchs_layers():
    """DTensors along the batch, and FSDP of one layer. Placements are those of two ranks, without two devices."""
    code = """
import torch, torch.distributed as dist, rkl_kernels as rk
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
mesh = init_device_mesh("cpu", (2,))
images = torch.randn(4, 3, 6, 6)
weights = torch.randn(3, 1, 3, 3), torch.randn(5, 3, 1, 1)
def placements(function):
    x = DTensor.from_local(images[:2], mesh, [Shard(0)]).requires_grad_()  # the first rank's; nothing is sent
    w, p = (DTensor.from_local(t, mesh, [Replicate()]).requires_grad_() for t in weights)
    y = function(x, w, p)
    y.sum().backward()
    whole = function(images[:2], *weights)
    torch.testing.assert_close(y.to_local(), whole)
    return [y.placements, *(t.grad.placements for t in (x, w, p) if t.grad is not None)]
for call in (
    lambda library, x, w, p: library.trelu(x),
    lambda library, x, w, p: library.trelu(x * 1, inplace=True),
    lambda library, x, w, p: library.depthwise_conv2d(x, w, padding=1),
    lambda library, x, w, p: library.separable_conv2d(x, w, p, activation="trelu", inner_activation="relu"),
):
    ours, theirs = (placements(lambda *t: call(library, *t)) for library in (rk, rk.reference))
    assert ours == theirs, (ours, theirs)
layer = rk.DepthwiseConv2d(4, 3)
fully_shard(layer, mesh=mesh)
layer(torch.randn(2, 4, 6, 6)).sum().backward()
assert layer.weight.grad is not None
"""
    done = forks.run(code)
    assert done.returncode == 0, done.stderr[-3000:]
