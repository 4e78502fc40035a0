"""Depthwise convolution in Triton: the portable path. It serves any strides and any window.

Where the moving window (window.py) serves, it computes the output and, at stride 1, the image's gradient. Elsewhere
both are a gather: each pixel of the output (or of the image's gradient) sums its taps from the image (or from the
output's gradient). The weight gradient has two stages, so that its sums have a fixed order without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from . import tiles
from . import window as moving
from .activation import activate
from .launch import aligned, alignment, block, is_wide, run, span, sum_splits

UNROLLED_TAPS = tl.constexpr(9)
"""Filters up to 3 x 3 are unrolled whole, so that the loads of all taps are in flight. A whole 7 x 7 spills."""
UNROLLED_WIDTH = tl.constexpr(7)
"""Larger filters of up to this width are unrolled by row. Wider rows, 31 taps say, go through a loop."""


@triton.jit
def source(at, tap, stride, padding, dilation, size, TRANSPOSED: tl.constexpr):
    """The row (or column) that ``tap`` reads for output row (or column) ``at``, and whether it lies in the image."""
    if TRANSPOSED:
        reach = at + padding - tap * dilation
        return reach // stride, (reach >= 0) & (reach % stride == 0) & (reach // stride < size)
    row = at * stride - padding + tap * dilation
    return row, (row >= 0) & (row < size)


@triton.jit
def add_tap(
    total, i, j, x, weight, rows, columns, valid, base, c, C, sizes, strides, window, KW, TRANSPOSED: tl.constexpr
):
    """``total`` (pixels, channels) plus the product of tap (i, j): a vector of the filter times a tile of the image."""
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w = window
    h, in_rows = source(rows, i, stride_h, padding_h, dilation_h, sizes[0], TRANSPOSED)
    w, in_columns = source(columns, j, stride_w, padding_w, dilation_w, sizes[1], TRANSPOSED)
    inside = valid & in_rows & in_columns
    pointers = x + (base + h * strides[2] + w * strides[3])[:, None] + c[None, :] * strides[1]
    value = tl.load(pointers, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    factor = tl.load(weight + (i * KW + j) * C + c, mask=c < C, other=0.0).to(tl.float32)
    return total + value * factor[None, :]


@triton.jit
def gather(
    x,
    weight,
    n,
    rows,
    columns,
    valid,
    c,
    C,
    sizes,
    strides,
    window,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The depthwise sums of a tile (PIXELS, CHANNELS), in float32 registers; 0 where not ``valid``.

    ``weight`` is (KH, KW, C): see :func:`by_tap`.
    """
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    base = n * strides[0]
    if KH * KW <= UNROLLED_TAPS:
        for i in tl.static_range(KH):
            for j in tl.static_range(KW):
                total = add_tap(
                    total, i, j, x, weight, rows, columns, valid, base, c, C, sizes, strides, window, KW, TRANSPOSED
                )
    elif KW <= UNROLLED_WIDTH:
        for i in range(KH):
            for j in tl.static_range(KW):
                total = add_tap(
                    total, i, j, x, weight, rows, columns, valid, base, c, C, sizes, strides, window, KW, TRANSPOSED
                )
    else:
        for i in range(KH):
            for j in range(KW):
                total = add_tap(
                    total, i, j, x, weight, rows, columns, valid, base, c, C, sizes, strides, window, KW, TRANSPOSED
                )
    return total


@triton.jit
def pixel(m, sizes):
    """The image, row and column of pixel ``m`` of a batch."""
    return m // (sizes[0] * sizes[1]), m // sizes[1] % sizes[0], m % sizes[1]


@triton.jit
def _gather_kernel(
    x,
    weight,
    bias,
    y,
    pixels,
    C,
    x_sizes,
    y_sizes,
    x_strides,
    y_strides,
    window,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    y_strides, _ = aligned(y_strides, C, ALIGNMENT, WIDE)
    x_strides, C = aligned(x_strides, C, ALIGNMENT, WIDE)
    m = block(tl.program_id(0), PIXELS, WIDE)
    c = block(tl.program_id(1), CHANNELS, WIDE)
    n, row, column = pixel(m, y_sizes)
    total = gather(
        x, weight, n, row, column, m < pixels, c, C, x_sizes, x_strides, window, KH, KW, TRANSPOSED, PIXELS, CHANNELS
    )
    if bias is not None:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    pointers = y + (n * y_strides[0] + row * y_strides[2] + column * y_strides[3])[:, None] + c[None, :] * y_strides[1]
    tl.store(pointers, total.to(y.dtype.element_ty), mask=(m < pixels)[:, None] & (c < C)[None, :])


@triton.jit
def _weight_gradient_kernel(
    grad,
    x,
    partial,
    pixels,
    share,
    C,
    x_sizes,
    y_sizes,
    x_strides,
    grad_strides,
    window,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    FILTER: tl.constexpr,
    BIAS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One split's sums of image times gradient, written to ``partial`` (splits, C * TAPS filter values, C of the bias).

    The bias counts as the filter's last tap, over an image of ones. Without FILTER only the block of that tap is
    computed, and the image is not read.
    """
    grad_strides, _ = aligned(grad_strides, C, ALIGNMENT, WIDE)
    x_strides, C = aligned(x_strides, C, ALIGNMENT, WIDE)
    split = tl.program_id(2)
    tap = block(tl.program_id(0) + (0 if FILTER else TAPS // BLOCK_TAPS), BLOCK_TAPS, False)
    c = block(tl.program_id(1), CHANNELS, False)
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w = window
    total = tl.zeros((PIXELS, BLOCK_TAPS, CHANNELS), tl.float32)
    for step in range(share):
        m = block(split * share + step, PIXELS, WIDE)
        n, row, column = pixel(m, y_sizes)
        at = n * grad_strides[0] + row * grad_strides[2] + column * grad_strides[3]
        within = (m < pixels)[:, None] & (c < C)[None, :]
        g = tl.load(grad + at[:, None] + c[None, :] * grad_strides[1], mask=within, other=0.0).to(tl.float32)
        if FILTER:
            h, in_rows = source(row[:, None], (tap // KW)[None, :], stride_h, padding_h, dilation_h, x_sizes[0], False)
            j = (tap % KW)[None, :]
            w, in_columns = source(column[:, None], j, stride_w, padding_w, dilation_w, x_sizes[1], False)
            inside = (m < pixels)[:, None] & (tap < TAPS)[None, :] & in_rows & in_columns
            at = (n * x_strides[0])[:, None] + h * x_strides[2] + w * x_strides[3]
            pointers = x + at[:, :, None] + (c * x_strides[1])[None, None, :]
            value = tl.load(pointers, mask=inside[:, :, None] & (c < C)[None, None, :], other=0.0).to(tl.float32)
        else:
            value = tl.zeros((PIXELS, BLOCK_TAPS, CHANNELS), tl.float32)
        if BIAS:
            value = tl.where((tap == TAPS)[None, :, None], 1.0, value)
        total += value * g[:, None, :]
    sums = tl.sum(total, 0)
    row_of = partial + split.to(tl.int64) * (C * (TAPS + 1))
    mask = (c < C)[None, :]
    if FILTER:
        tl.store(row_of + c[None, :] * TAPS + tap[:, None], sums, mask=mask & (tap < TAPS)[:, None])
    if BIAS:
        tl.store(row_of + C * TAPS + c[None, :] + tap[:, None] * 0, sums, mask=mask & (tap == TAPS)[:, None])


def by_tap(weight: Tensor) -> Tensor:
    """A copy of the filter (C, 1, kh, kw) as (kh, kw, C), of a few kilobytes. One tap of 8 channels is then one vector
    load instead of 8 scattered loads, which were two thirds of all loads."""
    return weight.squeeze(1).permute(1, 2, 0).contiguous()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, window: tuple[int, ...],
              activation: int = 0) -> None:  # fmt: skip
    stride, padding = window[:2], window[2:4]
    # The moving window has programs for each row of a dilation. A single tap needs none, whatever its dilation.
    dilation = [d if taps > 1 else 1 for d, taps in zip(window[4:], weight.shape[2:], strict=True)]
    if moving.serves(weight.shape[2:], stride, dilation):
        moving.launch(x, by_tap(weight), bias, y, stride[0], padding, dilation, activation)
    else:
        _run_gather(x, weight, bias, y, window, False, activation)


def _image_gradient(grad: Tensor, weight: Tensor, dx: Tensor, window: tuple[int, ...]) -> None:
    """Computes the image's gradient. At stride 1 that is a convolution of ``grad`` with the flipped filter."""
    stride, padding, dilation = window[:2], window[2:4], window[4:]
    if stride == (1, 1):
        reach = tuple(d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True))
        _convolve(grad, weight.flip(2, 3), None, dx, (*stride, *reach, *dilation))
    else:
        _run_gather(grad, weight, None, dx, window, True)


def _run_gather(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, window: tuple[int, ...], transposed: bool,
                activation: int = 0) -> None:  # fmt: skip
    channels = min(tiles.CHANNELS, triton.next_power_of_2(x.shape[1]))
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    run(
        _gather_kernel,
        (triton.cdiv(pixels, tiles.HERE.gather), triton.cdiv(x.shape[1], channels)),
        x,
        by_tap(weight),
        bias,
        y,
        pixels,
        x.shape[1],
        tuple(x.shape[2:]),
        tuple(y.shape[2:]),
        x.stride(),
        y.stride(),
        window,
        KH=weight.shape[2],
        KW=weight.shape[3],
        TRANSPOSED=transposed,
        ACTIVATION=activation,
        ALIGNMENT=min(alignment(x), alignment(y)),
        PIXELS=tiles.HERE.gather,
        CHANNELS=channels,
        WIDE=is_wide(span(x, y)),
        num_warps=4,
    )


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: int = 0,
) -> Tensor:
    """The kernel of the operator. ``activation`` serves the first step of the separable operator."""
    size = ops.output_size(x, weight.shape[2:], stride, padding, dilation)
    shape = (*x.shape[:2], *size)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=ops.output_format(x, weight))
    if y.numel():
        dense = None if bias is None else bias.contiguous()  # the kernels read a bias without strides
        _convolve(x, weight, dense, y, (*stride, *padding, *dilation), activation)
    return y


def _gradient_of_weight(grad: Tensor, x: Tensor, weight: Tensor, window: tuple[int, ...], want_filter: bool,
                        want_bias: bool) -> Tensor:  # fmt: skip
    """Partial sums (splits, C * taps + C), the same ones whatever else is wanted."""
    C, taps = x.shape[1], weight[0].numel()
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    wanted = taps + want_bias
    block_taps = min(tiles.GRADIENT_TAPS, triton.next_power_of_2(wanted))
    channels = min(tiles.CHANNELS, triton.next_power_of_2(C))
    block_pixels = max(1, min(tiles.HERE.gradient_sums // (block_taps * channels), 4096))
    tap_blocks, channel_blocks = triton.cdiv(wanted, block_taps), triton.cdiv(C, channels)
    steps = triton.cdiv(pixels, block_pixels)
    share = max(1, triton.cdiv(steps, max(1, tiles.PROGRAMS // (tap_blocks * channel_blocks))))
    splits = triton.cdiv(steps, share)
    partial = torch.empty((splits, C * (taps + 1)), dtype=torch.float32, device=x.device)
    run(
        _weight_gradient_kernel,
        (tap_blocks if want_filter else 1, channel_blocks, splits),
        grad,
        x,
        partial,
        pixels,
        share,
        C,
        tuple(x.shape[2:]),
        tuple(grad.shape[2:]),
        x.stride(),
        grad.stride(),
        window,
        KW=weight.shape[3],
        TAPS=taps,
        FILTER=want_filter,
        BIAS=want_bias,
        ALIGNMENT=min(alignment(x), alignment(grad)),
        PIXELS=block_pixels,
        BLOCK_TAPS=block_taps,
        CHANNELS=channels,
        WIDE=is_wide(span(x, grad)),
        num_warps=4,
    )
    return partial


def depthwise_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, filter and bias where ``mask`` says so, empty tensors elsewhere."""
    dx, dw, db = ops.wanted(mask, x, weight, x.new_empty(x.shape[1]))
    window = (*stride, *padding, *dilation)
    if not grad.numel():
        return dx.zero_(), dw.zero_(), db.zero_()
    if mask[0]:
        _image_gradient(grad, weight, dx, window)
    if mask[1] or mask[2]:
        partial = _gradient_of_weight(grad, x, weight, window, mask[1], mask[2])
        if mask[1]:
            sum_splits(partial[:, : weight.numel()], dw)
        if mask[2]:
            sum_splits(partial[:, weight.numel() :], db)
    return dx, dw, db
