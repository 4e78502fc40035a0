"""Separable convolution in Triton: the depthwise tile, made in registers, is the matrix product's A operand.

Where fusing loses by count (rkl_kernels/planner.py), the same operator is composed of the depthwise kernel and the
library's matrix product instead. Either way the depthwise output is not kept for backward: it is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import fusion
from . import composed, tiles
from .activation import activate, slope_from_input, slope_from_output
from .depthwise import by_tap, depthwise_conv2d_backward, empty_output, gather, pixel
from .launch import aligned, alignment, block, is_wide, run, span, sum_splits
from .trelu import laid_out_like


@triton.jit
def _forward_kernel(
    x,
    depthwise,
    pointwise,
    depthwise_bias,
    pointwise_bias,
    y,
    pixels,
    C,
    C_OUT,
    x_sizes,
    y_sizes,
    x_strides,
    y_strides,
    window,
    KH: tl.constexpr,
    KW: tl.constexpr,
    INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    OUT_ALIGNMENT: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    x_strides, C = aligned(x_strides, C, ALIGNMENT)
    y_strides, C_OUT = aligned(y_strides, C_OUT, OUT_ALIGNMENT)
    m = block(tl.program_id(0), PIXELS, WIDE)
    o = block(tl.program_id(1), OUTPUTS, WIDE)
    n, row, column = pixel(m, y_sizes)
    product = tl.zeros((PIXELS, OUTPUTS), tl.float32)
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        tile = gather(
            x, depthwise, n, row, column, m < pixels, c, C, x_sizes, x_strides, window, KH, KW, False, PIXELS, CHANNELS
        )
        if depthwise_bias is not None:
            tile += tl.load(depthwise_bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        tile = activate(tile, INNER).to(x.dtype.element_ty)
        factor = tl.load(
            pointwise + o[None, :] * C + c[:, None], mask=(c < C)[:, None] & (o < C_OUT)[None, :], other=0.0
        )
        product = tl.dot(tile, factor, product, input_precision=PRECISION)
    if pointwise_bias is not None:
        product += tl.load(pointwise_bias + o, mask=o < C_OUT, other=0.0).to(tl.float32)[None, :]
    product = activate(product, ACTIVATION)
    pointers = y + (n * y_strides[0] + row * y_strides[2] + column * y_strides[3])[:, None] + o[None, :] * y_strides[1]
    tl.store(pointers, product.to(y.dtype.element_ty), mask=(m < pixels)[:, None] & (o < C_OUT)[None, :])


@triton.jit
def _backward_kernel(
    grad,
    y,
    x,
    depthwise,
    pointwise,
    depthwise_bias,
    inner_grad,
    partial,
    pixels,
    share,
    C,
    C_OUT,
    x_sizes,
    y_sizes,
    x_strides,
    y_strides,
    grad_strides,
    inner_strides,
    window,
    KH: tl.constexpr,
    KW: tl.constexpr,
    INNER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    OUT_ALIGNMENT: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(grad, x) -> the depthwise output's gradient, and one split's sums of the pointwise filter's and bias's.

    The depthwise tile is made again; one read of the output's gradient serves both products.
    ``partial``: (splits, C_OUT * C filter values, then C_OUT of the bias).
    """
    inner_strides, _ = aligned(inner_strides, C, ALIGNMENT)
    x_strides, C = aligned(x_strides, C, ALIGNMENT)
    y_strides, _ = aligned(y_strides, C_OUT, OUT_ALIGNMENT)
    grad_strides, C_OUT = aligned(grad_strides, C_OUT, OUT_ALIGNMENT)
    split = tl.program_id(1)
    c = block(tl.program_id(0), CHANNELS, False)
    o = block(0, OUTPUTS, False)
    filter_at = o[:, None] * C + c[None, :]
    filter_mask = (o < C_OUT)[:, None] & (c < C)[None, :]
    factor = tl.load(pointwise + filter_at, mask=filter_mask, other=0.0)
    sums = tl.zeros((OUTPUTS, CHANNELS), tl.float32)
    bias_sums = tl.zeros((OUTPUTS,), tl.float32)
    for step in range(share):
        m = block(split * share + step, PIXELS, WIDE)
        n, row, column = pixel(m, y_sizes)
        tile = gather(
            x, depthwise, n, row, column, m < pixels, c, C, x_sizes, x_strides, window, KH, KW, False, PIXELS, CHANNELS
        )
        if depthwise_bias is not None:
            tile += tl.load(depthwise_bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        within = (m < pixels)[:, None] & (o < C_OUT)[None, :]
        at = n * grad_strides[0] + row * grad_strides[2] + column * grad_strides[3]
        g = tl.load(grad + at[:, None] + o[None, :] * grad_strides[1], mask=within, other=0.0)
        if ACTIVATION != 0:
            at = n * y_strides[0] + row * y_strides[2] + column * y_strides[3]
            out = tl.load(y + at[:, None] + o[None, :] * y_strides[1], mask=within, other=0.0).to(tl.float32)
            g = (g.to(tl.float32) * slope_from_output(out, ACTIVATION)).to(grad.dtype.element_ty)
        bias_sums += tl.sum(g.to(tl.float32), 0)
        value = activate(tile, INNER).to(x.dtype.element_ty)
        sums = tl.dot(tl.trans(g), value, sums, input_precision=PRECISION)
        down = tl.dot(g, factor, input_precision=PRECISION)
        if INNER != 0:
            down *= slope_from_input(tile, INNER)
        at = n * inner_strides[0] + row * inner_strides[2] + column * inner_strides[3]
        pointers = inner_grad + at[:, None] + c[None, :] * inner_strides[1]
        tl.store(pointers, down.to(inner_grad.dtype.element_ty), mask=(m < pixels)[:, None] & (c < C)[None, :])
    row_of = partial + split.to(tl.int64) * (C_OUT * (C + 1))
    tl.store(row_of + filter_at, sums, mask=filter_mask)
    tl.store(row_of + C_OUT * C + o, bias_sums, mask=(o < C_OUT) & (tl.program_id(0) == 0))


def plan(x: Tensor, depthwise: Tensor, outputs: int, out_size: Sequence[int], backward: bool) -> fusion.Choice:
    """Fused or not; a backward whose output channels do not fit into one block is never fused."""
    tile = tiles.product(x, outputs, backward)
    if backward and outputs > tile.outputs:
        return fusion.Choice(False, f"more than {tile.outputs} output channels do not fit into one block", 0, 0)
    return fusion.fuse_separable(x, depthwise, outputs, out_size, tiles.unit(x), tile.outputs, backward)


def separable_conv2d(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    inner: int,
    activation: int,
) -> Tensor:
    """The operator."""
    y = empty_output(x, depthwise, pointwise.shape[0], stride, padding, dilation)
    if not y.numel():
        return y
    weight = pointwise.reshape(pointwise.shape[:2]).contiguous()
    if not plan(x, depthwise, pointwise.shape[0], y.shape[2:], backward=False).fused:
        geometry = (stride, padding, dilation)
        result = composed.forward(x, depthwise, weight, depthwise_bias, pointwise_bias, geometry, inner, activation)
        return laid_out_like(result, y)
    tile = tiles.product(x, pointwise.shape[0], backward=False)
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    run(
        _forward_kernel,
        (triton.cdiv(pixels, tile.pixels), triton.cdiv(pointwise.shape[0], tile.outputs)),
        x,
        by_tap(depthwise),
        weight,
        depthwise_bias,
        pointwise_bias,
        y,
        pixels,
        x.shape[1],
        pointwise.shape[0],
        tuple(x.shape[2:]),
        tuple(y.shape[2:]),
        x.stride(),
        y.stride(),
        (*stride, *padding, *dilation),
        **_constants(tile, x, y, depthwise, inner, activation),
        WIDE=is_wide(span(x, y)),
    )
    return y


def _constants(
    tile: tiles.Product, x: Tensor, y: Tensor, depthwise: Tensor, inner: int, activation: int
) -> dict[str, Any]:
    return {
        "KH": depthwise.shape[2],
        "KW": depthwise.shape[3],
        "INNER": inner,
        "ACTIVATION": activation,
        "PRECISION": "tf32" if tiles.unit(x) == "tf32" else "ieee",
        "ALIGNMENT": alignment(x),
        "OUT_ALIGNMENT": alignment(y),
        "PIXELS": tile.pixels,
        "OUTPUTS": tile.outputs,
        "CHANNELS": tile.channels,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _fused_backward(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    depthwise: Tensor,
    weight: Tensor,
    depthwise_bias: Tensor | None,
    window: composed.Window,
    inner: int,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """The gradient of the depthwise output, and partial sums (splits, C' * C + C')."""
    C, outputs = x.shape[1], weight.shape[0]
    tile = tiles.product(x, outputs, backward=True)
    like = suggest_memory_format(x)
    inner_grad = torch.empty((grad.shape[0], C, *grad.shape[2:]), dtype=x.dtype, device=x.device, memory_format=like)
    steps = triton.cdiv(grad.shape[0] * grad.shape[2] * grad.shape[3], tile.pixels)
    blocks = triton.cdiv(C, tile.channels)
    share = triton.cdiv(steps, max(1, tiles.PROGRAMS // blocks))
    splits = triton.cdiv(steps, share)
    partial = torch.empty((splits, outputs * (C + 1)), dtype=torch.float32, device=x.device)
    out = grad if y is None else y
    constants = _constants(tile, x, grad, depthwise, inner, activation)
    constants["ALIGNMENT"] = min(alignment(x), alignment(inner_grad))
    constants["OUT_ALIGNMENT"] = min(alignment(grad), alignment(out))
    run(
        _backward_kernel,
        (blocks, splits),
        grad,
        out,
        x,
        by_tap(depthwise),
        weight,
        depthwise_bias,
        inner_grad,
        partial,
        grad.shape[0] * grad.shape[2] * grad.shape[3],
        share,
        C,
        outputs,
        tuple(x.shape[2:]),
        tuple(grad.shape[2:]),
        x.stride(),
        out.stride(),
        grad.stride(),
        inner_grad.stride(),
        tuple(size for pair in window for size in pair),
        **constants,
        WIDE=is_wide(span(x, grad, out, inner_grad)),
    )
    return inner_grad, partial


def separable_conv2d_backward(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    depthwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    inner: int,
    activation: int,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of image, both filters and both biases; those that ``mask`` leaves out come back empty."""
    C, outputs = x.shape[1], pointwise.shape[0]
    dp, dpb = (
        torch.empty_like(t, memory_format=suggest_memory_format(t)) if wanted else t.new_empty(0)
        for t, wanted in zip((pointwise, x.new_empty(outputs)), (mask[2], mask[4]), strict=True)
    )
    depthwise_mask = [mask[0], mask[1], mask[3]]
    geometry = (stride, padding, dilation)
    inner_grad: Tensor | None = None
    shared = (
        grad,
        y,
        x,
        depthwise,
        pointwise.reshape(outputs, C).contiguous(),
        depthwise_bias,
        geometry,
        inner,
        activation,
    )
    if not grad.numel():
        dp.zero_()
        dpb.zero_()
    elif plan(x, depthwise, outputs, grad.shape[2:], backward=True).fused:
        inner_grad, partial = _fused_backward(*shared)
        if mask[2]:
            sum_splits(partial[:, : outputs * C], dp)
        if mask[4]:
            sum_splits(partial[:, outputs * C :], dpb)
    else:
        inner_grad, of_weight, of_bias = composed.backward(*shared, [any(depthwise_mask), mask[2], mask[4]])
        if of_weight is not None:
            dp.copy_(of_weight.view_as(dp))
        if of_bias is not None:
            dpb.copy_(of_bias)
    if inner_grad is None:
        inner_grad = grad.new_empty((grad.shape[0], C, 0, 0))
    dx, dd, ddb = depthwise_conv2d_backward(inner_grad, x, depthwise, *geometry, depthwise_mask)
    return dx, dd, dp, ddb, dpb
