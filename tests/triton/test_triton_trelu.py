"""T-ReLU and the other activations in Triton, against the float64 reference."""

import pytest
import torch
from bounds import TYPES, copies, roundoff

import rkl_kernels as rk
from rkl_kernels._checks import ACTIVATIONS
from rkl_kernels.triton.trelu import activate, times_derivative

SPECIAL = [0.0, -0.0, 1e-30, -1e-30, -0.5499, -0.5501, 80.0, -80.0, 1e4, -1e4, float("inf"), -float("inf")]


def values(dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([torch.linspace(-12, 12, 4001), torch.randn(3000) * 0.1, torch.tensor(SPECIAL)]).to(dtype)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_forward_is_within_rounding(dtype):
    x = values(dtype)
    with rk.use_backend("triton"):
        y = rk.trelu(x)
    exact = rk.reference.trelu(x.double())
    # An error of 3 ulp in tanh in float32, then the rounding to the type.
    ulp = 3 * torch.finfo(torch.float32).eps + (roundoff(dtype) if dtype != torch.float32 else 0)
    finite = exact.isfinite()
    assert torch.equal(y[~finite].double(), exact[~finite])
    assert ((y.double() - exact)[finite].abs() <= ulp * exact[finite].abs() + torch.finfo(dtype).tiny).all()


def test_nan_stays_nan_and_minus_infinity_gives_minus_one():
    x = torch.tensor([float("nan"), -float("inf"), float("inf")], requires_grad=True)
    with rk.use_backend("triton"):
        y = rk.trelu(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones(3))
    assert y[0].isnan()
    assert y[1:].tolist() == [-1.0, float("inf")]
    assert grad[1:].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("layout", ["dense", "transposed", "gaps", "NHWC", "empty", "scalar"])
def test_layouts_and_gradient(dtype, layout):
    x = {
        "dense": torch.randn(3, 5, 7),
        "transposed": torch.randn(3, 5, 7).transpose(0, 2),
        "gaps": torch.randn(4, 6, 10, 9)[:, ::2, 1:, ::3],
        "NHWC": torch.randn(2, 5, 3, 7).contiguous(memory_format=torch.channels_last),
        "empty": torch.randn(0, 4),
        "scalar": torch.tensor(-0.3),
    }[layout].to(dtype)
    x.requires_grad_()
    with rk.use_backend("triton"):
        y = rk.trelu(x)
        grad = torch.randn(y.shape).to(dtype)
        (dx,) = torch.autograd.grad(y, x, grad)
    (twin,) = copies(x)
    exact = rk.reference.trelu(twin)
    (exact_dx,) = torch.autograd.grad(exact, twin, grad.double())
    assert y.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(y.double(), exact, rtol=2 * roundoff(dtype) + 1e-6, atol=1e-7)
    # 1 - y^2 is computed from the rounded y. That is an error of 2 |y| u(y) before the gradient's own rounding.
    torch.testing.assert_close(dx.double(), exact_dx, rtol=2 * roundoff(dtype), atol=3 * roundoff(dtype) * 4 + 1e-6)


@pytest.mark.parametrize("gaps", [False, True])
def test_in_place(gaps):
    x = torch.randn(3, 4, 6, 8)[:, :, ::2] if gaps else torch.randn(3, 4, 6, 8)
    exact = rk.reference.trelu(x.double())
    with rk.use_backend("triton"):
        assert rk.trelu(x, inplace=True) is x
    torch.testing.assert_close(x.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_and_derivative(name):
    """The formulas that mirror csrc/activation.h, each against PyTorch's own function and its gradient."""
    x = values(torch.float32)[:-2]
    number = ACTIVATIONS.index(name) + 1
    (twin,) = copies(x)
    exact = rk.reference.activate(twin, name)
    (derivative,) = torch.autograd.grad(exact, twin, torch.ones_like(twin))
    y = activate(x, number)
    torch.testing.assert_close(y.double(), exact.detach(), rtol=1e-6, atol=2e-6)
    ones = torch.ones_like(x)
    torch.testing.assert_close(times_derivative(ones, x, number, False).double(), derivative, rtol=1e-5, atol=2e-6)
    if name in ("relu", "relu6", "trelu"):
        torch.testing.assert_close(times_derivative(ones, y, number, True).double(), derivative, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("from_output", [True, False])
@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_relu_and_relu6_select(name, from_output):
    """An infinite or NaN gradient becomes 0 where they are flat and passes elsewhere, as in PyTorch."""
    x = torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0, float("nan")], requires_grad=True)
    exact = rk.reference.activate(x, name)
    for gradient in (float("inf"), float("nan")):
        grad = torch.full_like(x, gradient)
        (expected,) = torch.autograd.grad(exact, x, grad, retain_graph=True)
        value = exact if from_output else x
        dx = times_derivative(grad, value.detach(), ACTIVATIONS.index(name) + 1, from_output)
        torch.testing.assert_close(dx, expected, rtol=0, atol=0, equal_nan=True)
