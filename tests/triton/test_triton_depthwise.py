"""Depthwise convolution in Triton: every type and layout, odd shapes, all three gradients, against float64."""

import pytest
import sanitizer
import torch
from bounds import TYPES, assert_near, copies, image, magnitudes

import rkl_kernels as rk
from rkl_kernels.triton import depthwise as kernels
from rkl_kernels.triton import launch, tiles

# (N, C, H, W), (kh, kw), stride, padding, dilation, layout
CASES = {
    "3x3": ((2, 20, 9, 11), (3, 3), 1, 1, 1, "NHWC"),
    "3x3 NCHW": ((1, 5, 4, 7), (3, 3), 1, 1, 1, "NCHW"),
    "stride 2": ((1, 7, 10, 7), (3, 3), 2, 1, 1, "NHWC"),
    "5x3 stride 2, lopsided": ((2, 33, 9, 8), (5, 3), (2, 1), (2, 0), 1, "NCHW"),
    "7x7": ((1, 16, 8, 8), (7, 7), 1, 3, 1, "NHWC"),
    "5x5 stride 2": ((1, 16, 9, 12), (5, 5), 2, 2, 1, "NHWC"),
    "3x7": ((2, 8, 5, 9), (3, 7), 1, (0, 3), 1, "NHWC"),
    "every second row": ((2, 8, 11, 9), (3, 3), 1, 2, 2, "NHWC"),
    "even": ((1, 8, 6, 7), (2, 4), 1, 1, 1, "NHWC"),
    "padding wider than the filter": ((1, 8, 4, 5), (3, 1), 1, (4, 3), 1, "NHWC"),
    "dilated": ((1, 5, 13, 9), (3, 3), (1, 3), (4, 2), (4, 2), "gaps"),
    "1x1": ((2, 3, 4, 5), (1, 1), 1, 0, 1, "NCHW"),
    "image smaller than filter": ((3, 8, 2, 1), (5, 5), 1, 2, 1, "NHWC"),
    "31 wide, through a loop": ((1, 4, 6, 7), (2, 31), 1, (1, 15), 1, "NHWC"),
}


def check(shape, kernel, stride, padding, dilation, layout, dtype, bias=True):
    x = image(*shape, dtype=dtype, layout=layout).requires_grad_()
    weight = torch.randn(shape[1], 1, *kernel).to(dtype).requires_grad_()
    offset = torch.randn(shape[1]).to(dtype).requires_grad_() if bias else None
    inputs = [t for t in (x, weight, offset) if t is not None]
    with rk.use_backend("triton"):
        y = rk.depthwise_conv2d(x, weight, offset, stride, padding, dilation)
    assert (
        y.stride()
        == torch.nn.functional.conv2d(x.detach(), weight.detach(), None, stride, padding, dilation, shape[1]).stride()
    )
    grad = torch.randn(y.shape[0], y.shape[1], y.shape[3], y.shape[2]).to(dtype).transpose(2, 3)  # strided
    grads = torch.autograd.grad(y, inputs, grad)

    def reference(tensors, gradient):
        result = rk.reference.depthwise_conv2d(*tensors, stride, padding, dilation)
        return result, torch.autograd.grad(result, [t for t in tensors if t is not None], gradient)

    exact, exact_grads = reference(copies(x, weight, offset), grad.double())
    size, sizes = reference(magnitudes(x, weight, offset), grad.double().abs())
    taps, pixels = weight[0].numel(), grad.numel() // shape[1]
    assert_near(y, exact, size, taps)
    for got, want, magnitude, terms in zip(grads, exact_grads, sizes, (taps, pixels, pixels), strict=False):
        assert_near(got, want, magnitude, terms)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients(case):
    check(*case, torch.float32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ["stride 2", "dilated"])
def test_sixteen_bits(case, dtype):
    check(*CASES[case], TYPES[dtype], bias=False)


# Several blocks of columns (from more than one image) and of channels, several splits and several pieces of the rows.
GPU_CASES = {
    "by the window": ((2, 70, 26, 4), (3, 3), 1, 1, 1, "NHWC"),
    "by the window, dilated": ((1, 8, 61, 6), (3, 3), 1, (3, 2), (2, 3), "NHWC"),
    "by the window, larger": ((1, 8, 41, 3), (5, 5), 1, 2, 1, "NHWC"),
    "by the window, stride 2": ((1, 8, 53, 9), (3, 3), 2, 1, 1, "NHWC"),
    "gathered": ((1, 70, 5, 8), (3, 3), (2, 1), 1, 1, "NHWC"),
}


@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
def test_tiles_of_a_gpu(case, monkeypatch):
    monkeypatch.setattr(tiles, "HERE", tiles.GPU)
    monkeypatch.setattr(tiles, "PROGRAMS", 6)
    check(*case, torch.float32)


@pytest.mark.parametrize("kernel", [(1, 3), (3, 3)])
def test_rows_further_apart_than_a_grid_has_programs(monkeypatch, kernel):
    """The dilation of one tap means nothing. Three taps are left to the gather, whose programs lie along one axis."""
    grids = []

    def run(kernel, grid, *args, **constants):
        assert max(grid[1:]) <= 65535
        grids.append(grid)
        launch.run(kernel, grid, *args, **constants)

    for module in (kernels, kernels.moving):
        monkeypatch.setattr(module, "run", run)
    far = 70000
    check((1, 2, 4, 5), kernel, 1, (far * (kernel[0] // 2), 1), (far, 1), "NHWC", torch.float32)
    assert len(grids) == 3


def test_vectors_of_eight_channels():
    """The compiler is told of strides that are multiples of 8 but not of 16."""
    x = image(1, 24, 5, 6, dtype=torch.float16, layout="NHWC")
    assert kernels.alignment(x) == 8
    check((1, 24, 5, 6), (3, 3), 1, 1, 1, "NHWC", torch.float16)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True)])
def test_unwanted_gradients_come_back_empty(mask):
    x, weight = torch.randn(2, 3, 6, 5), torch.randn(3, 1, 3, 3)
    window = [1, 1], [1, 1], [1, 1]
    backward = torch.ops.rkl_triton.depthwise_conv2d_backward
    grad = torch.randn(2, 3, 6, 5)
    everything = backward(grad, x, weight, *window, [True] * 3)
    for wanted, got, whole in zip(mask, backward(grad, x, weight, *window, list(mask)), everything, strict=True):
        assert torch.equal(got, whole) if wanted else got.shape == (0,)


@pytest.mark.parametrize("apart", [0, 2])
@pytest.mark.parametrize("kernel", [3, 9])
def test_a_bias_whose_values_lie_apart(apart, kernel):
    """The bias is expanded or a slice. The moving window serves it, and so does the kernel that gathers."""
    x, weight = torch.randn(2, 8, 9, 9), torch.randn(8, 1, kernel, kernel)
    bias = torch.randn(16).as_strided((8,), (apart,))
    with rk.use_backend("triton"):
        y = rk.depthwise_conv2d(x, weight, bias, 1, kernel // 2)
    torch.testing.assert_close(y, rk.reference.depthwise_conv2d(x, weight, bias, 1, kernel // 2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel", [3, 8])  # the bias beside all taps, or after 64 of them
def test_of_a_frozen_filter_the_image_is_not_read(monkeypatch, kernel):
    """The bias's gradient alone has the same bits as when the filter's is computed too."""
    x, weight = image(2, 20, 9, 11, dtype=torch.float32, layout="NHWC"), torch.randn(20, 1, kernel, kernel)
    window = [1, 1], [1, 1], [1, 1]
    grad = torch.randn_like(rk.reference.depthwise_conv2d(x, weight, None, *window))
    was_read = []

    def sum_splits(*tensors):
        _, reader = sanitizer.current.storages[1].shadows(4)  # the last launch had gradient, image and sums
        was_read.append(bool((reader != sanitizer.NOBODY).any()))
        launch.sum_splits(*tensors)

    monkeypatch.setattr(kernels, "sum_splits", sum_splits)
    backward = torch.ops.rkl_triton.depthwise_conv2d_backward
    *_, expected = backward(grad, x, weight, *window, [False, True, True])
    _, unwanted, db = backward(grad, x, weight, *window, [False, False, True])
    assert torch.equal(db, expected)
    assert not unwanted.numel()
    assert was_read[0]
    assert not was_read[-1]


def test_empty_batch():
    x = torch.randn(0, 3, 6, 5, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, requires_grad=True)
    with rk.use_backend("triton"):
        y = rk.depthwise_conv2d(x, weight, padding=1)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_second_derivative():
    x, weight = torch.randn(1, 4, 6, 5, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)

    def penalty(x, weight, function):
        y = function(x, weight, None, 1, 1, 1)
        dx, dw = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, weight))

    with rk.use_backend("triton"):
        got = penalty(x, weight, rk.depthwise_conv2d)
    for a, b in zip(got, penalty(*copies(x, weight), rk.reference.depthwise_conv2d), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)


def test_offsets_beyond_31_bits():
    """Two images more than 2^31 elements apart. Nothing else of the memory is ever touched."""
    apart = 2**31 + 64
    memory = torch.empty(apart + 8 * 5 * 4, dtype=torch.float16)
    x = memory.as_strided((2, 8, 5, 4), (apart, 1, 32, 8))
    x.copy_(torch.randn(x.shape))
    weight = torch.randn(8, 1, 3, 3).half()
    with rk.use_backend("triton"):
        y = rk.depthwise_conv2d(x, weight, padding=1)
    reference = [t.double() for t in (x, weight)]
    exact = rk.reference.depthwise_conv2d(*reference, padding=1)
    size = rk.reference.depthwise_conv2d(*(t.abs() for t in reference), padding=1)
    assert_near(y, exact, size, 9)


# In an image of more than 2^31 elements, rows or channels lie so far apart that an index times a stride exceeds 2^31.
FAR = 2**30 + 64
APART = {  # as if NHWC, as if NCHW
    "rows": ((1, 8, 4, 4), (4 * FAR, 1, FAR, 8)),
    "channels": ((1, 4, 5, 6), (4 * FAR, FAR, 8, 1)),
}


@pytest.mark.parametrize("kernel", [(3, 3), (8, 2)])  # by the window; by the gather
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("apart", APART)
def test_one_image_beyond_31_bits(apart, stride, kernel):
    """The strides of such an image. Only the image's elements in the memory are ever touched."""
    image, strides = APART[apart]
    c = image[1]

    def far(*shape):
        x = torch.empty(4 * FAR, dtype=torch.float16).as_strided(shape, strides)
        return x.copy_(torch.randn(shape))

    x, weight = far(*image), torch.randn(c, 1, *kernel).half()
    window = [stride] * 2, [k // 2 for k in kernel], [1, 1]
    with rk.use_backend("triton"):
        y = rk.depthwise_conv2d(x, weight, None, *window)
    grad = far(*y.shape) if y.shape[2] <= 4 else torch.randn(y.shape).half()
    dx, dw, db = torch.ops.rkl_triton.depthwise_conv2d_backward(grad, x, weight, *window, [True] * 3)
    tensors = [x, weight, torch.zeros(c)]
    twins, sizes = copies(*tensors), magnitudes(*tensors)
    exact, size = (rk.reference.depthwise_conv2d(*t, *window) for t in (twins, sizes))
    assert_near(y, exact, size, weight[0].numel())
    grads = torch.autograd.grad(exact, twins, grad.double())
    for got, want, magnitude in zip(
        (dx, dw, db), grads, torch.autograd.grad(size, sizes, grad.double().abs()), strict=True
    ):
        assert_near(got, want, magnitude, max(weight[0].numel(), grad.numel() // c))


# Not the checks of tracing: test_triton_model.py traces a whole model, and tests/test_contract.py checks the shared
# gradients.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_operator_is_well_formed():
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(3, 1, 3, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    window = [2, 1], [1, 1], [1, 1]
    torch.library.opcheck(torch.ops.rkl_triton.depthwise_conv2d.default, (x, weight, bias, *window), test_utils=CHECKS)
    args = (torch.randn(2, 3, 3, 5), x.detach(), weight.detach(), *window, [True, False, True])
    torch.library.opcheck(torch.ops.rkl_triton.depthwise_conv2d_backward.default, args, test_utils=CHECKS)
