"""Separable convolution in Triton: every type, layout and activation, against float64."""

import pytest
import torch
from bounds import TYPES, assert_near, copies, image, magnitudes, roundoff

import rkl_kernels as rk
from rkl_kernels._checks import ACTIVATIONS

# (N, C, H, W), C', kernel, stride, padding, dilation
CASES = {
    "3x3": ((2, 20, 7, 9), 33, 3, 1, 1, 1),
    "5x3 stride 2": ((1, 17, 9, 8), 5, (5, 3), 2, (2, 1), 1),
    "dilated": ((1, 3, 9, 7), 40, 3, 1, 2, 2),
    "many outputs": ((1, 16, 4, 5), 300, 3, 1, 1, 1),
}
LAYOUTS = dict(zip(CASES, ("NHWC", "NCHW", "gaps", "NHWC"), strict=True))


def tensors(shape, outputs, kernel, dtype, layout):
    size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    return [
        image(*shape, dtype=dtype, layout=layout).requires_grad_(),
        *(
            torch.randn(s).to(dtype).requires_grad_()
            for s in ((shape[1], 1, *size), (outputs, shape[1], 1, 1), (shape[1],), (outputs,))
        ),
    ]


def check(case, dtype, layout, inner=None, activation=None):
    shape, outputs, kernel, *window = case
    inputs = tensors(shape, outputs, kernel, dtype, layout)
    with rk.use_backend("triton"):
        y = rk.separable_conv2d(*inputs, *window, inner, activation)
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "NHWC" else torch.contiguous_format)
    grad = torch.randn(y.shape).to(dtype)
    grads = torch.autograd.grad(y, inputs, grad)
    twins = copies(*inputs)
    exact = rk.reference.separable_conv2d(*twins, *window, inner, activation)
    exact_grads = torch.autograd.grad(exact, twins, grad.double())
    large = magnitudes(*inputs)
    size = rk.reference.separable_conv2d(*large, *window)
    sizes = torch.autograd.grad(size, large, grad.double().abs())
    taps, channels, pixels = inputs[1][0].numel(), shape[1], grad.numel() // outputs
    # The depthwise tile (forward) and the gradients between the steps (backward) are rounded to the operands' type. An
    # activation's derivative is computed from a rounded value, and carries that rounding once more.
    rounded = roundoff(dtype) if dtype != torch.float32 else 0.0
    derivative = 1.3 if inner or activation else 1.0  # no less than the steepest slope of silu and gelu
    assert_near(y, exact, derivative * size, 2 * (taps + channels), rounded)
    terms = (taps + outputs, pixels + outputs, pixels + taps, pixels + outputs, pixels)
    for got, want, magnitude, count in zip(grads, exact_grads, sizes, terms, strict=True):
        assert_near(got, want, 4 * derivative * magnitude, count, 4 * rounded)


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case):
    check(CASES[case], torch.float32, LAYOUTS[case])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits(dtype):
    check(CASES["3x3"], TYPES[dtype], "NHWC")


@pytest.mark.parametrize(
    ("inner", "activation"), [(None, "trelu"), ("trelu", None), ("silu", "trelu"), ("gelu", "silu")]
)
def test_smooth_activations(inner, activation):
    """T-ReLU, silu and gelu have no kink, so the rounding bound holds for their gradients too."""
    check(CASES["3x3"], torch.float32, "NHWC", inner, activation)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    inputs = tensors((1, 6, 5, 7), 9, 3, torch.float32, "NHWC")
    with rk.use_backend("triton"):
        y = rk.separable_conv2d(*inputs, padding=1, inner_activation=name, activation=name)
        grads = torch.autograd.grad(y.square().sum(), inputs)
    twins = copies(*inputs)
    exact = rk.reference.separable_conv2d(*twins, padding=1, inner_activation=name, activation=name)
    for got, want in zip((y, *grads), (exact, *torch.autograd.grad(exact.square().sum(), twins)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_an_infinite_gradient_where_an_activation_is_flat(name, layout):
    """The gradient is 0 there, as in PyTorch, not infinity times zero."""
    inputs = tensors((2, 6, 5, 7), 6, 3, torch.float32, layout)
    with rk.use_backend("triton"):
        y = rk.separable_conv2d(*inputs, padding=1, inner_activation=name, activation=name)
    flat = (y == 0) | (y == 6)
    assert flat.any()
    finite, infinite = (torch.where(flat, grad, torch.ones_like(y)) for grad in (0.0, torch.inf))
    expected = torch.autograd.grad(y, inputs, finite, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(y, inputs, infinite), expected))
    assert all(g.isfinite().all() for g in expected)


@pytest.mark.parametrize("wanted", range(5))
def test_unwanted_gradients_come_back_empty(wanted):
    x, dw, pw, db, _ = (t.detach() for t in tensors((1, 3, 5, 4), 6, 3, torch.float32, "NCHW"))
    grad = torch.randn(1, 6, 5, 4)
    settings = [1, 1], [1, 1], [1, 1], 3, 0
    backward = torch.ops.rkl_triton.separable_conv2d_backward
    everything = backward(grad, None, x, dw, pw, db, *settings, [True] * 5)
    mask = [i == wanted for i in range(5)]
    for i, got in enumerate(backward(grad, None, x, dw, pw, db, *settings, mask)):
        assert torch.equal(got, everything[i]) if i == wanted else got.shape == (0,)


def test_empty_batch():
    inputs = tensors((0, 3, 5, 4), 6, 3, torch.float32, "NCHW")
    with rk.use_backend("triton"):
        rk.separable_conv2d(*inputs, padding=1).sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in inputs)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_operator_is_well_formed():
    x, dw, pw, db, pb = tensors((2, 3, 6, 5), 4, 3, torch.float32, "NHWC")
    settings = [1, 1], [1, 1], [1, 1], 3, 3
    torch.library.opcheck(
        torch.ops.rkl_triton.separable_conv2d.default, (x, dw, pw, db, pb, *settings), test_utils=CHECKS
    )
    plain = [t.detach() for t in (x, dw, pw, db)]
    args = (torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5), *plain, *settings, [True, True, False, False, True])
    torch.library.opcheck(torch.ops.rkl_triton.separable_conv2d_backward.default, args, test_utils=CHECKS)


def test_explanation_names_both_steps():
    x, dw, pw, *_ = (t.detach() for t in tensors((2, 16, 8, 8), 32, 3, torch.float16, "NHWC"))
    with rk.use_backend("triton"):
        told = rk.explain("separable_conv2d", x, dw, pw, None, None, 1, 1)
    assert told.kernel == "torch.ops.rkl_triton.separable_conv2d"
    assert told.fused is False
    assert "not fused: a depthwise kernel and the library's product" in str(told)
