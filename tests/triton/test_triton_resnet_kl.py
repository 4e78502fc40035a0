"""A whole ResNet-KL training step on the Triton kernels gives the gradients of the reference."""

import pytest
import torch
from torch import nn

import rkl_kernels as rk

model = pytest.importorskip("rkl.network.model", reason="extra [train] not installed")


def test_gradients_of_a_whole_step():
    torch.manual_seed(0)
    net = model.ResNetKL(classes=4, depth=18, width=4)
    exact = model.ResNetKL(classes=4, depth=18, width=4).double()
    exact.load_state_dict(net.state_dict())
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])

    def gradients(net, images, backend):
        net.train()
        with rk.use_backend(backend):
            logits = net(images).logits
            torch.stack([nn.functional.cross_entropy(head, labels) for head in logits]).sum().backward()
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    got, want = gradients(net, images, "triton"), gradients(exact, images.double(), "reference")
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        # Batch norm over two images amplifies small differences. The bound is a share of the layer's largest gradient.
        error = (got[name].double() - gradient).abs().max().item()
        assert error <= 2e-3 * gradient.abs().max().item() + 1e-6, name
