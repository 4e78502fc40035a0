"""Depthwise convolution with a window that moves down the image: the fast path of :mod:`.depthwise`.

A program has some columns of some channels and slides over the rows. It reads each row of the image once for each
column of the filter, and adds it to every output row that needs it. So a pixel costs KW loads instead of KH * KW.
After each row the sums move on by one register name. Which columns lie in the image is known before the first row.
"""

# ruff: noqa: RUF005  (Triton reads no starred tuples)
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .activation import activate
from .launch import aligned, alignment, block, is_wide, run, span

MOST_TAPS = 7
"""The most taps of a row and of a column. With more, the sums in flight do not fit into a thread's registers."""
MOST_APART = 65535
"""The largest dilation of rows. Its programs lie along the grid's third axis, and CUDA allows no more of them."""
HELD_TAPS = tl.constexpr(9)
"""Up to this many taps stay in registers. Larger filters read their taps again for each row, from the cache."""


@triton.jit
def _column(weight, j, c, C, KH: tl.constexpr, KW: tl.constexpr):
    """The taps of column j of the filter, one for each row."""
    taps = ()
    for kh in tl.static_range(KH):
        taps = taps + (tl.load(weight + (kh * KW + j) * C + c, mask=c < C, other=0.0),)  # type: ignore[assignment]
    return taps


@triton.jit
def _pixels(row, column, j, valid, channels, sizes, strides, padding, dilation, STRIDE: tl.constexpr):
    """The pixels that tap j of a row reads for each output column, in float32. ``row``: the addresses of column 0."""
    w = column * STRIDE - padding[1] + j * dilation[1]
    inside = valid & (w >= 0) & (w < sizes[1])
    return tl.load(row + (w * strides[3])[:, None], mask=inside[:, None] & channels, other=0.0).to(tl.float32)


@triton.jit
def _add(sums, value, taps, part: tl.constexpr, KH: tl.constexpr, STRIDE: tl.constexpr):
    """The sums of the output rows in flight, with a row of the image added. Sum i uses row i * STRIDE + part of the
    filter, if the filter has that row."""
    added = ()
    for i in tl.static_range((KH + STRIDE - 1) // STRIDE):
        if i * STRIDE + part < KH:
            added = added + (sums[i] + value * taps[i * STRIDE + part].to(tl.float32)[None, :],)  # type: ignore[assignment]
        else:
            added = added + (sums[i],)  # type: ignore[assignment]
    return added


@triton.jit
def _window_kernel(
    x,
    weight,
    bias,
    y,
    columns,
    rows,
    C,
    x_sizes,
    y_sizes,
    x_strides,
    y_strides,
    padding,
    dilation,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``columns``: of all images, side by side. A program has ``rows`` output rows, spaced like the filter's rows."""
    y_strides, _ = aligned(y_strides, C, ALIGNMENT, WIDE)
    x_strides, C = aligned(x_strides, C, ALIGNMENT, WIDE)
    at = block(tl.program_id(0), COLUMNS, WIDE)
    c = block(tl.program_id(1), CHANNELS, WIDE)
    apart = dilation[0]
    first = tl.program_id(2) // apart * rows * apart + tl.program_id(2) % apart  # output row
    count = tl.minimum(rows, tl.cdiv(y_sizes[0] - first, apart))
    n, column = at // y_sizes[1], at % y_sizes[1]
    channels, valid = (c < C)[None, :], at < columns
    to = y + (n * y_strides[0] + column * y_strides[3])[:, None] + c[None, :] * y_strides[1]
    image = x + (n * x_strides[0])[:, None] + c[None, :] * x_strides[1]
    columns_of_taps = ()
    if KH * KW <= HELD_TAPS:
        for j in tl.static_range(KW):
            columns_of_taps = columns_of_taps + (_column(weight, j, c, C, KH, KW),)  # type: ignore[assignment]
    IN_FLIGHT: tl.constexpr = (KH + STRIDE - 1) // STRIDE  # output rows that a row of the image is added to
    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    sums = (zero,) * IN_FLIGHT
    for step in range(count + IN_FLIGHT - 1):
        sums = (zero,) + sums[:-1]  # a new output row; the oldest one has been stored
        for part in tl.static_range(STRIDE):
            h = first * STRIDE - padding[0] + (step * STRIDE + part) * apart
            row = image + h * x_strides[2]
            inside = valid & (h >= 0) & (h < x_sizes[0])
            if KH * KW <= HELD_TAPS:
                for j in tl.static_range(KW):
                    value = _pixels(row, column, j, inside, channels, x_sizes, x_strides, padding, dilation, STRIDE)
                    sums = _add(sums, value, columns_of_taps[j], part, KH, STRIDE)
            else:  # a loop, since the loads of an unrolled row of taps would take all registers
                for j in range(KW):
                    value = _pixels(row, column, j, inside, channels, x_sizes, x_strides, padding, dilation, STRIDE)
                    sums = _add(sums, value, _column(weight, j, c, C, KH, KW), part, KH, STRIDE)
        if step >= IN_FLIGHT - 1:
            out = (first + (step - (IN_FLIGHT - 1)) * apart) * y_strides[2]
            result = sums[IN_FLIGHT - 1]
            if bias is not None:
                result += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
            tl.store(to + out, activate(result, ACTIVATION).to(y.dtype.element_ty), mask=valid[:, None] & channels)


def serves(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether the window serves: filters up to 7 x 7, at stride 1 with any dilation that fits a grid, at 2 without."""
    plain = stride[0] == stride[1] and (stride[0] == 1 or (stride[0] == 2 and max(dilation) == 1))
    return plain and max(kernel) <= MOST_TAPS and dilation[0] <= MOST_APART


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, stride: int, padding: Sequence[int],
           dilation: Sequence[int], activation: int) -> None:  # fmt: skip
    """``y`` = ``x`` convolved with ``weight`` (kh, kw, C): see :func:`.depthwise.by_tap`."""
    kh, kw, C = weight.shape
    of_program = tiles.HERE.small_window if kh * kw <= HELD_TAPS.value else tiles.HERE.window
    channels = min(tiles.CHANNELS, triton.next_power_of_2(C))
    columns, height = y.shape[0] * y.shape[3], y.shape[2]
    across = triton.cdiv(columns, of_program), triton.cdiv(C, channels)
    of_one = triton.cdiv(height, dilation[0])  # output rows that one program could have
    # Enough programs for every processor, but not so short that much of what they read is rows around their own.
    pieces = min(triton.cdiv(2 * tiles.PROGRAMS, across[0] * across[1] * dilation[0]), triton.cdiv(of_one, 4 * kh))
    rows = triton.cdiv(of_one, max(1, pieces))
    run(
        _window_kernel,
        (*across, triton.cdiv(of_one, rows) * dilation[0]),
        x,
        weight,
        bias,
        y,
        columns,
        rows,
        C,
        tuple(x.shape[2:]),
        tuple(y.shape[2:]),
        x.stride(),
        y.stride(),
        tuple(padding),
        tuple(dilation),
        KH=kh,
        KW=kw,
        STRIDE=stride,
        ACTIVATION=activation,
        ALIGNMENT=min(alignment(x), alignment(y)),
        COLUMNS=of_program,
        CHANNELS=channels,
        WIDE=is_wide(span(x, y)),
        num_warps=4,
    )
