"""The passes around a library's matrix product (csrc/cuda/epilogue.cu) on the emulated GPU, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rkl_kernels import reference
from rkl_kernels._checks import ACTIVATIONS

from .conftest import DTYPES, ORDERS, Gpu

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HARDWARE_TANH = {torch.float32: 0, torch.bfloat16: 2**-11, torch.float16: 2**-11}
# Rows of whole vectors of 16 bytes, and rows that have none.
SHAPES = [(70, 24), (33, 7)]


def put(gpu: Gpu, *shape: int, dtype: torch.dtype) -> Tensor:
    return gpu.put((torch.randn(shape) * 2).to(dtype))


@pytest.mark.sanitized
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_activation(gpu: Gpu, dtype: torch.dtype, shape: tuple[int, int], activation: str | None) -> None:
    z, bias, out = put(gpu, *shape, dtype=dtype), put(gpu, shape[1], dtype=dtype), gpu.empty(*shape, dtype=dtype)
    code = ACTIVATIONS.index(activation) + 1 if activation else 0
    gpu.kernels.epilogue(z.data_ptr(), bias.data_ptr(), code, out.data_ptr(), *shape, gpu.dtype(dtype), 0)
    expected = reference.activate(z.double() + bias.double(), activation)
    rtol = ROUNDING[dtype] + (HARDWARE_TANH[dtype] if activation == "trelu" else 0)
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=1e-6)
    before = z.clone()
    gpu.kernels.epilogue(z.data_ptr(), 0, code, z.data_ptr(), *shape, gpu.dtype(dtype), 0)  # in place
    expected = reference.activate(before.double(), activation)
    torch.testing.assert_close(z.double(), expected, rtol=rtol, atol=1e-6)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_may_begin_anywhere(gpu: Gpu, dtype: torch.dtype) -> None:
    """A bias may be a view into one buffer of all parameters. It gets the kernel and the bits of an aligned bias."""
    z, bias, buffer = put(gpu, 300, 24, dtype=dtype), put(gpu, 24, dtype=dtype), gpu.empty(25, dtype=dtype)
    moved = buffer[1:].copy_(bias)
    assert moved.data_ptr() % 16
    outs, blocks = [], []
    for one in (bias, moved):
        out, before = gpu.empty(*z.shape, dtype=dtype), gpu.traffic()
        gpu.kernels.epilogue(z.data_ptr(), one.data_ptr(), 1, out.data_ptr(), *z.shape, gpu.dtype(dtype), 0)
        name = "bias_and_activation"
        blocks.append(gpu.traffic()[name].blocks - (before[name].blocks if name in before else 0))
        outs.append(out)
    assert torch.equal(*outs)
    assert blocks[0] == blocks[1]


def test_more_than_two_to_the_31_elements(gpu: Gpu) -> None:
    # Two pieces of whole rows. The first and the last block of each run; the memory of the others is never touched.
    rows, channels = 2**31 // 24 + 1000, 24
    z, out = (gpu.empty(rows, channels, dtype=torch.bfloat16, fill=False) for _ in range(2))
    bias = gpu.put(torch.arange(24, dtype=torch.bfloat16))
    gpu.kernels.schedule.first_blocks, gpu.kernels.schedule.last_blocks = 1, 1
    for end in (slice(0, 85), slice(-1000, -915), slice(-10, None)):
        z[end] = 1
    gpu.kernels.epilogue(z.data_ptr(), bias.data_ptr(), 0, out.data_ptr(), rows, channels, gpu.dtype(torch.bfloat16), 0)
    for end in (slice(0, 85), slice(-1000, -915), slice(-10, None)):
        assert torch.equal(out[end], (1 + bias).expand_as(out[end])), end


def ends_of_pieces(elements: int) -> list[slice]:
    """Elements of the first and last blocks of each piece, for a tensor that is cut at every 2^31 elements."""
    return [slice(0, 100), slice(2**31 - 100, 2**31 + 100), slice(elements - 100, elements)]


# An image, and below a single plane, of 2^32 elements and more is cut into pieces.
@pytest.mark.parametrize("bias", [True, False])
def test_an_image_of_more_than_two_to_the_32_elements(gpu: Gpu, bias: bool) -> None:
    channels, plane = 2**17 + 8, 2**15
    z, number = gpu.empty(channels * plane, dtype=torch.bfloat16, fill=False), gpu.dtype(torch.bfloat16)
    biases = gpu.put(torch.randn(channels).bfloat16())
    gpu.kernels.schedule.first_blocks, gpu.kernels.schedule.last_blocks = 1, 1
    for end in ends_of_pieces(z.numel()):
        z[end] = 1
    gpu.kernels.plane_epilogue(
        z.data_ptr(), biases.data_ptr() if bias else 0, 1, z.data_ptr(), 1, channels, plane, number, 0
    )
    for end in ends_of_pieces(z.numel()):
        added = biases[torch.arange(end.start, end.stop) // plane] if bias else torch.zeros(())
        assert torch.equal(z[end], (1 + added).relu().expand(end.stop - end.start).bfloat16()), end


def test_a_plane_of_more_than_two_to_the_32_elements(gpu: Gpu) -> None:
    plane, number = 2**32 + 8, gpu.dtype(torch.bfloat16)
    z, bias = gpu.empty(plane, dtype=torch.bfloat16, fill=False), gpu.put(torch.tensor([2.0]).bfloat16())
    gpu.kernels.schedule.first_blocks, gpu.kernels.schedule.last_blocks = 1, 1
    for add in (0, bias.data_ptr()):
        for end in ends_of_pieces(plane):
            z[end] = -1
        gpu.kernels.plane_epilogue(z.data_ptr(), add, 1, z.data_ptr(), 1, 1, plane, number, 0)
        for end in ends_of_pieces(plane):
            assert (z[end] == (1 if add else 0)).all(), end


@pytest.mark.sanitized
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_backward(gpu: Gpu, dtype: torch.dtype, activation: str) -> None:
    grad, x, out = (put(gpu, 33, 7, dtype=dtype) for _ in range(3))
    code, number = ACTIVATIONS.index(activation) + 1, gpu.dtype(dtype)
    exact = x.double().requires_grad_()
    y = reference.activate(exact, activation)
    (expected,) = torch.autograd.grad(y, exact, grad.double())
    gpu.kernels.activation_backward(grad.data_ptr(), x.data_ptr(), code, False, out.data_ptr(), x.numel(), number, 0)
    torch.testing.assert_close(out.double(), expected, rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])
    if activation in ("silu", "gelu"):
        return
    y = gpu.put(y.detach().to(dtype))
    derivatives = {"relu": (y > 0).double(), "relu6": ((y > 0) & (y < 6)).double()}
    derivative = derivatives.get(activation, torch.where(y > 0, 1, 1 - y.double() ** 2))
    out.fill_(torch.nan)
    gpu.kernels.activation_backward(grad.data_ptr(), y.data_ptr(), code, True, out.data_ptr(), x.numel(), number, 0)
    torch.testing.assert_close(out.double(), grad.double() * derivative, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("from_output", [True, False])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_an_infinite_gradient_where_an_activation_is_flat(gpu: Gpu, activation: str, from_output: bool) -> None:
    """The gradient is 0 there, as in PyTorch, not infinity times zero. At a NaN it passes."""
    x = gpu.put(torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0, torch.nan])).requires_grad_()
    y = reference.activate(x, activation)
    grad, out = gpu.put(torch.full((6,), torch.inf)), gpu.empty(6)
    (expected,) = torch.autograd.grad(y, x, grad)
    value, code = gpu.put(y) if from_output else x, ACTIVATIONS.index(activation) + 1
    pointers = grad.data_ptr(), value.data_ptr()
    gpu.kernels.activation_backward(*pointers, code, from_output, out.data_ptr(), 6, gpu.dtype(torch.float32), 0)
    assert torch.equal(out, expected)


def column_sums(gpu: Gpu, matrix: Tensor) -> Tensor:
    out = gpu.empty(matrix.shape[1], dtype=matrix.dtype)
    workspace = gpu.empty(gpu.kernels.column_sums_workspace(*matrix.shape))
    pointers = matrix.data_ptr(), out.data_ptr()
    gpu.kernels.column_sums(*pointers, *matrix.shape, workspace.data_ptr(), gpu.dtype(matrix.dtype), 0)
    return out


@pytest.mark.sanitized
@pytest.mark.parametrize("shape", [(1, 1), (1300, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums(gpu: Gpu, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrix = put(gpu, *shape, dtype=dtype)
    out = column_sums(gpu, matrix)
    exact = matrix.double().sum(0)
    allowed = ROUNDING[dtype] * exact.abs() + 1e-6 * matrix.double().abs().sum(0)
    assert ((out.double() - exact).abs() <= allowed).all()


def test_more_columns_than_a_grid_is_tall(gpu: Gpu) -> None:
    columns = 2**16 * 32 + 5  # a block has 32: a pointwise filter of 1536 by 1536 has more columns than that
    matrix = gpu.put(torch.arange(columns).remainder(1000).float()[None])
    gpu.kernels.schedule.first_blocks, gpu.kernels.schedule.last_blocks = 1, 1
    out = column_sums(gpu, matrix)
    for end in (slice(0, 32), slice(-5, None)):
        assert torch.equal(out[end], matrix[0, end])


@pytest.mark.sanitized
def test_column_sums_are_the_same_in_any_order(gpu: Gpu) -> None:
    matrix = put(gpu, 1300, 40, dtype=torch.float32)
    results = []
    for order in ORDERS:
        gpu.schedule(order)
        results.append(column_sums(gpu, matrix))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# In 16 bits a block takes 2048 elements, which are whole sectors. So only the bias, read by each block, moves twice.
def test_bytes_moved(gpu: Gpu) -> None:
    z, bias = put(gpu, 1024, 64, dtype=torch.bfloat16), put(gpu, 64, dtype=torch.bfloat16)
    values, number = put(gpu, 1024, 64, dtype=torch.bfloat16), gpu.dtype(torch.bfloat16)
    gpu.kernels.epilogue(z.data_ptr(), bias.data_ptr(), 1, z.data_ptr(), *z.shape, number, 0)
    blocks = z.numel() // (4 * 2048)
    assert gpu.moved() == 2 * z.nbytes + blocks * bias.nbytes
    before = gpu.moved()
    gpu.kernels.activation_backward(z.data_ptr(), values.data_ptr(), 1, True, z.data_ptr(), z.numel(), number, 0)
    assert gpu.moved() - before == 3 * z.nbytes
    before = gpu.moved()
    column_sums(gpu, z)
    sums = gpu.kernels.column_sums_workspace(*z.shape) * 4
    assert gpu.moved() - before == z.nbytes + 2 * sums + bias.nbytes


# Planes of whole vectors, and planes that have none.
@pytest.mark.sanitized
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 9, 7, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes(gpu: Gpu, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    n, c, h, w = shape
    z, bias, out = put(gpu, *shape, dtype=dtype), put(gpu, c, dtype=dtype), gpu.empty(*shape, dtype=dtype)
    number = gpu.dtype(dtype)
    gpu.kernels.plane_epilogue(z.data_ptr(), bias.data_ptr(), 1, out.data_ptr(), n, c, h * w, number, 0)
    expected = (z.double() + bias.double()[:, None, None]).relu()
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    sums, workspace = gpu.empty(c, dtype=dtype), gpu.empty(gpu.kernels.plane_sums_workspace(n, c, h * w))
    gpu.kernels.plane_sums(z.data_ptr(), sums.data_ptr(), n, c, h * w, workspace.data_ptr(), number, 0)
    torch.testing.assert_close(
        sums.double(), z.double().sum((0, 2, 3)), rtol=ROUNDING[dtype], atol=40 * 1e-6 + ROUNDING[dtype]
    )
