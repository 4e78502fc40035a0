"""A whole training step on the Triton kernels gives the gradients of the reference."""

import pytest
import torch
from torch import nn

import rkl_kernels as rk


class Net(nn.Module):
    """Separable, depthwise and T-ReLU layers with a residual, batch norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = rk.SeparableConv2d(8, 16, 3, stride=2, padding=1, inner_activation="silu", activation="trelu")
        self.norm = nn.BatchNorm2d(16)
        self.spatial = rk.DepthwiseConv2d(16, 5, padding="same")
        self.activation = rk.TReLU(inplace=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x))
        x = x + self.activation(self.spatial(self.norm(x)))
        return self.head(x.mean((2, 3)))


def gradients(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
    with rk.use_backend(backend):
        nn.functional.cross_entropy(model(images), labels).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_step_has_the_gradients_of_the_reference(layout):
    torch.manual_seed(0)
    model = Net()
    exact = Net().double()
    exact.load_state_dict(model.state_dict())
    images, labels = torch.randn(4, 3, 12, 12).contiguous(memory_format=layout), torch.tensor([1, 2, 3, 4])
    got = gradients(model, images, labels, "triton")
    want = gradients(exact, images.double(), labels, "reference")
    for name, gradient in want.items():
        error = (got[name] - gradient).abs().max().item()
        assert error <= 1e-5 + 1e-4 * gradient.abs().max().item(), name


def test_torch_compile_without_graph_breaks():
    model = Net().eval()
    images = torch.randn(2, 3, 8, 8)
    with rk.use_backend("triton"), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(compiled, model(images), rtol=1e-5, atol=1e-5)


def test_cpu_tensors_are_served_and_others_refused():
    status = rk.backends()["triton"]
    assert status.available
    assert "interpreted" in status.reason
    with rk.use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        rk.trelu(torch.zeros(2, dtype=torch.float64))
