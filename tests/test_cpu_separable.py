"""The CPU's separable kernels against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rkl_kernels as rk
from rkl_kernels import _checks, ops, reference

CASES = [  # N, C, C', H, W, k, stride, padding, dilation
    (2, 5, 9, 7, 9, 3, 1, 1, 1),
    (1, 16, 33, 13, 13, 3, 2, 1, 1),
    (2, 17, 1, 9, 10, 5, 1, 2, 1),
    (1, 1, 8, 9, 9, 3, 1, 2, 2),
    (3, 8, 8, 1, 1, 3, 1, 1, 1),
    (2, 32, 24, 9, 8, 3, 1, 1, 1),  # pixels of whole lines
    (3, 32, 64, 16, 15, 3, 1, 1, 1),  # in bands, outputs of whole lines
    (2, 32, 96, 9, 8, 3, 1, 1, 1),
    (1, 32, 8, 24, 48, 3, 3, 1, 1),  # taps one by one
]
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # shares of the largest magnitude


def make(case: tuple[int, ...], dtype: torch.dtype, nhwc: bool, biases: bool) -> tuple[list[Tensor | None], list]:
    n, c, c_out, h, w, k, *window = case
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w).to(dtype)
    x = x.to(memory_format=torch.channels_last) if nhwc else x
    depthwise, pointwise = torch.randn(c, 1, k, k).to(dtype) / k, torch.randn(c_out, c, 1, 1).to(dtype)
    both = [torch.randn(c).to(dtype), torch.randn(c_out).to(dtype)] if biases else [None, None]
    return [x, depthwise, pointwise, *both], [[v, v] for v in window]


def close(got: Tensor, want: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
    """``scale``: the values that errors are relative to, where an activation may have cut off the larger ones."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    largest = (want if scale is None else scale).abs().max()
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * largest


@pytest.mark.parametrize("inner", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case: tuple[int, ...], dtype: torch.dtype, nhwc: bool, inner: int) -> None:
    activation = (0, 1, 2, 3)[inner % 4]
    tensors, window = make(case, dtype, nhwc, biases=inner != 1)
    doubles = [None if t is None else t.double().requires_grad_() for t in tensors]
    names = [None, *_checks.ACTIVATIONS]
    want = reference.separable_conv2d(*doubles, *window, names[inner], names[activation])
    y = ops.rkl.separable_conv2d(*tensors, *window, inner, activation)
    close(y, want.detach(), dtype, scale=reference.separable_conv2d(*doubles, *window, names[inner]).detach())
    fake = [None if t is None else t.to("meta") for t in tensors]
    assert y.stride() == ops._fake_separable(*fake, *window, 0, 0).stride()
    if dtype != torch.float32:
        return  # rounding can change the side of a kink; 16-bit gradients are checked without activations below

    grad, present = torch.randn_like(y), [d for d in doubles if d is not None]
    wanted = torch.autograd.grad(want, present, grad.double())
    mask = [t is not None for t in tensors]
    got = ops.rkl.separable_conv2d_backward(grad, y, *tensors[:4], *window, inner, activation, mask)
    for g, w in zip([g for g, m in zip(got, mask, strict=True) if m], wanted, strict=True):
        close(g, w, dtype)


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_in_16_bits(case: tuple[int, ...], dtype: torch.dtype, nhwc: bool) -> None:
    tensors, window = make(case, dtype, nhwc, biases=True)
    doubles = [t.double().requires_grad_() for t in tensors]
    y = ops.rkl.separable_conv2d(*tensors, *window, 0, 0)
    grad = torch.rand_like(y)  # positive, so that the sums for the biases do not cancel
    wanted = torch.autograd.grad(reference.separable_conv2d(*doubles, *window), doubles, grad.double())
    got = ops.rkl.separable_conv2d_backward(grad, None, *tensors[:4], *window, 0, 0, [True] * 5)
    for g, w in zip(got, wanted, strict=True):
        close(g, w, dtype)


@pytest.mark.parametrize("wanted", range(5))
def test_one_wanted_gradient(wanted: int) -> None:
    tensors, window = make(CASES[0], torch.float32, True, biases=True)
    y = ops.rkl.separable_conv2d(*tensors, *window, 3, 3)
    every = ops.rkl.separable_conv2d_backward(y, y, *tensors[:4], *window, 3, 3, [True] * 5)
    one = ops.rkl.separable_conv2d_backward(y, y, *tensors[:4], *window, 3, 3, [i == wanted for i in range(5)])
    for i in range(5):
        assert one[i].numel() == (every[i].numel() if i == wanted else 0)
    torch.testing.assert_close(one[wanted], every[wanted])


@pytest.mark.parametrize("shape", [(0, 4, 6, 8, 8), (2, 4, 0, 8, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    tensors, window = make((*shape, 3, 1, 1, 1), torch.float32, False, biases=True)
    y = ops.rkl.separable_conv2d(*tensors, *window, 0, 1)
    assert y.shape == (shape[0], shape[2], 8, 8)
    grads = ops.rkl.separable_conv2d_backward(y, y, *tensors[:4], *window, 0, 1, [True] * 5)
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_operators_keep_torchs_contract(nhwc: bool) -> None:
    tensors, window = make(CASES[0], torch.float32, nhwc, biases=True)
    for t in tensors:
        t.requires_grad_()
    torch.library.opcheck(
        torch.ops.rkl.separable_conv2d.default,
        (*tensors, *window, 3, 3),
        # Differentiating twice is an error, which the dynamic trace would run into.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    y = ops.rkl.separable_conv2d(*tensors, *window, 3, 3).detach()
    plain = [t.detach() for t in tensors[:4]]
    torch.library.opcheck(
        torch.ops.rkl.separable_conv2d_backward.default,
        (y, y, *plain, *window, 3, 3, [True, False, True, True, False]),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_silu_of_large_numbers() -> None:
    """exp stops growing at 88. Its inverse must vanish all the same, and -inf gives NaN as in PyTorch."""
    values = torch.tensor(
        [-1e38, -1e10, -1e4, -100.0, -89.0, -88.0, -20.0, 0.0, 88.0, 1e38, float("inf"), -float("inf")]
    )
    x = values.view(-1, 1, 1, 1).expand(-1, 16, 1, 1).contiguous().requires_grad_()
    one, identity = torch.ones(16, 1, 1, 1), torch.eye(16).view(16, 16, 1, 1)
    y = ops.rkl.separable_conv2d(x[:-2].detach(), one, identity, None, None, [1, 1], [0, 0], [1, 1], 4, 0)
    torch.testing.assert_close(y, torch.nn.functional.silu(x[:-2].detach()), rtol=2e-6, atol=1e-36)
    odd = ops.rkl.separable_conv2d(x[-1:].detach(), one, identity, None, None, [1, 1], [0, 0], [1, 1], 4, 0)
    assert odd.isnan().all()


def test_gelu_keeps_its_digits() -> None:
    """0.5 x (1 + erf) loses all digits where erf is near -1: F.gelu on a CPU is off by 17 % at -5."""
    gelu, one, window = 5, torch.ones(1, 1, 1, 1), [[1, 1], [0, 0], [1, 1]]
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-1e-30, 0.0, 1e4, -20.0])]).view(1, 1, 1, -1)
    exact = x.double().requires_grad_()
    want = exact * 0.5 * torch.special.erfc(-exact / 2**0.5)
    y = ops.rkl.separable_conv2d(x, one, one, None, None, *window, gelu, 0)
    torch.testing.assert_close(y.double(), want, rtol=6e-6, atol=1e-37)

    mask = [True, False, False, False, False]
    arguments = (torch.ones_like(y), y, x, one, one, None, *window, gelu, 0)
    dx = ops.rkl.separable_conv2d_backward(*arguments, mask)[0]
    derivative = torch.autograd.grad(want.sum(), exact)[0]
    torch.testing.assert_close(dx.double(), derivative, rtol=1e-5, atol=1e-7)

    odd = torch.tensor([float("inf"), -float("inf"), float("nan")]).view(1, 1, 1, 3)
    y = ops.rkl.separable_conv2d(odd, one, one, None, None, *window, gelu, 0)
    torch.testing.assert_close(y.flatten(), torch.tensor([float("inf"), float("nan"), float("nan")]), equal_nan=True)


@pytest.mark.parametrize("name", [1, 2])
def test_a_nan_lets_the_gradient_of_relu_pass(name: int) -> None:
    """As in PyTorch, so that no step hides a NaN. ``name`` is the number of relu or relu6."""
    x = torch.full((1, 1, 2, 3), float("nan"))
    one, grad, window = torch.ones(1, 1, 1, 1), torch.randn(1, 1, 2, 3), [[1, 1], [0, 0], [1, 1]]
    for activations in ((name, 0), (0, name)):
        y = ops.rkl.separable_conv2d(x, one, one, None, None, *window, *activations)
        assert y.isnan().all()
        mask = [True, False, False, False, False]
        dx = ops.rkl.separable_conv2d_backward(grad, y, x, one, one, None, *window, *activations, mask)[0]
        assert torch.equal(dx, grad)


def test_depthwise_step_is_left_to_pytorch_too() -> None:
    """Where PyTorch's own convolution makes a depthwise output faster, it makes that of a separable convolution too."""
    x = torch.randn(32, 11, 32, 32).bfloat16().to(memory_format=torch.channels_last)
    depthwise, pointwise = torch.randn(11, 1, 3, 3).bfloat16(), torch.randn(4, 11, 1, 1).bfloat16()
    if not torch.ops.rkl.cpu_depthwise_by_pytorch(x, depthwise, (1, 1), (1, 1), (1, 1)):
        pytest.skip("measured for AVX-512 with bf16 alone, which this machine has not")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = rk.separable_conv2d(x, depthwise, pointwise, padding=1, inner_activation="relu")
    assert [event.count for event in profile.key_averages() if event.key == "aten::convolution"] == [1]
    wanted = F.conv2d(F.conv2d(x.double(), depthwise.double(), padding=1, groups=11).relu(), pointwise.double())
    close(y, wanted, torch.bfloat16)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("size", [6, 40])
def test_an_infinite_gradient_where_an_activation_is_flat(layout, activation, size):
    """The gradient is 0 there, as in PyTorch, not infinity times zero."""
    x = torch.randn(2, 16, size, size).contiguous(memory_format=layout).requires_grad_()
    w, p = torch.randn(16, 1, 3, 3, requires_grad=True), torch.randn(16, 16, 1, 1, requires_grad=True)
    with rk.use_backend("cpu"):
        y = rk.separable_conv2d(x, w, p, padding=1, inner_activation=activation, activation=activation)
    flat = (y == 0) | (y == 6)
    assert flat.any()
    finite, infinite = (torch.where(flat, grad, torch.ones_like(y)) for grad in (0.0, torch.inf))
    expected = torch.autograd.grad(y, (x, w, p), finite, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(y, (x, w, p), infinite), expected))
    assert all(g.isfinite().all() for g in expected)
