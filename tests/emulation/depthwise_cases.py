"""Depthwise convolutions on the emulated GPU: a case, its run, and the bound on each result's error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from exactness import assert_rounded
from torch import Tensor

from rkl_kernels import reference
from rkl_kernels._checks import ACTIVATIONS

from .conftest import Gpu

MOST_TERMS = 28
"""The most terms that the bound of a sum counts. Kernels add long sums in parts, so not every term adds error."""
# For an activated value: one rounding to the element type, relative to the sum of magnitudes. In fp32 the rounding of
# the sums counts too.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@dataclass(frozen=True)
class Case:
    """A depthwise convolution. The default sizes are odd, so that no tile is full."""

    channels: int = 16
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (9, 11)
    batch: int = 2
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    nhwc: bool = True

    def __str__(self) -> str:
        numbers = (self.channels, *self.kernel, *self.size, *self.stride, *self.padding, *self.dilation)
        return f"{'nhwc' if self.nhwc else 'nchw'}-{self.batch}x" + "-".join(map(str, numbers))

    @property
    def out_size(self) -> tuple[int, int]:
        zipped = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        h, w = ((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in zipped)
        return h, w


class Run:
    """A case's tensors on the device, and the results that the kernels make of them."""

    def __init__(self, gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.gpu, self.case, self.number = gpu, case, gpu.dtype(dtype)
        c, n = case.channels, case.batch
        self.x, self.grad = (self.random(n, c, *size, dtype=dtype) for size in (case.size, case.out_size))
        self.weight, self.bias = self.random(c, 1, *case.kernel, dtype=dtype), self.random(c, dtype=dtype)
        names = (
            "in_h",
            "in_w",
            "out_h",
            "out_w",
            "kernel_h",
            "kernel_w",
            "stride_h",
            "stride_w",
            "padding_h",
            "padding_w",
        )
        values = (*case.size, *case.out_size, *case.kernel, *case.stride, *case.padding)
        self.geometry = gpu.kernels.Conv2d(
            batch=n, channels=c, nhwc=case.nhwc, dilation_h=case.dilation[0], dilation_w=case.dilation[1],
            **dict(zip(names, values, strict=True)),
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a result. Images have the case's layout."""
        return self.gpu.empty(*shape, dtype=dtype, nhwc=len(shape) == 4 and shape[1] > 1 and self.case.nhwc)

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.empty(*shape, dtype=dtype).copy_(torch.randn(shape, dtype=dtype))

    def forward(self, with_bias: bool = True, activation: int = 0) -> Tensor:
        y = self.empty(*self.grad.shape, dtype=self.x.dtype)
        bias = self.bias.data_ptr() if with_bias else 0
        self.gpu.kernels.depthwise(
            self.geometry, self.x.data_ptr(), self.weight.data_ptr(), bias, activation, y.data_ptr(), self.number, 0
        )
        return y

    def backward(self, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Tensor:
        """Compute the gradients of the tensors that are given.

        Returns the workspace. With dw it holds the sums of (parts, taps + 1, channels).
        """
        gradients = [0 if t is None else t.data_ptr() for t in (dx, dw, db)]
        tensors = (self.grad.data_ptr(), self.x.data_ptr(), self.weight.data_ptr())
        kernels = self.gpu.kernels
        plan = kernels.plan_depthwise_backward(self.geometry, *tensors[:2], *gradients, self.number)
        workspace = self.empty(plan.workspace(self.geometry))
        kernels.depthwise_backward(plan, self.geometry, *tensors, *gradients, workspace.data_ptr(), self.number, 0)
        return workspace

    def input_grad(self) -> Tensor:
        dx = self.empty(*self.x.shape, dtype=self.x.dtype)
        self.backward(dx, None, None)
        return dx

    def weight_grad(self, weight: bool = True, bias: bool = True) -> tuple[Tensor, Tensor]:
        dw, db = (self.empty(*t.shape, dtype=self.x.dtype) for t in (self.weight, self.bias))
        self.backward(None, dw if weight else None, db if bias else None)
        return dw, db

    def both_grads(self, bias: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of image, filter and bias, from one call."""
        dx, dw, db = (self.empty(*t.shape, dtype=self.x.dtype) for t in (self.x, self.weight, self.bias))
        self.backward(dx, dw, db if bias else None)
        return dx, dw, db

    def compared(self, x: Tensor) -> Tensor:
        """The part of a tensor that is compared."""
        return x

    def reference(self, magnitudes: bool = False) -> tuple[Tensor, ...]:
        """y, dx, dw and db in fp64, or the same of the tensors' magnitudes, for the error bounds."""
        x, w, b, grad = (self.compared(t).double().clone() for t in (self.x, self.weight, self.bias, self.grad))
        if magnitudes:
            x, w, b, grad = (t.abs() for t in (x, w, b, grad))
        for t in (x, w, b):
            t.requires_grad_()
        case = self.case
        y = F.conv2d(x, w, b, case.stride, case.padding, case.dilation, groups=len(w))
        return (y.detach(), *torch.autograd.grad(y, (x, w, b), grad))


def assert_right(run: Run, *names: str) -> None:
    """Check results by name: "y", "dx" and "dw" (with db) each come from their own call, "both" from a single one."""
    results: dict[str, Tensor] = {}
    if "y" in names:
        results["y"] = run.forward()
    if "dx" in names:
        results["dx"] = run.input_grad()
    if "dw" in names:
        results["dw"], results["db"] = run.weight_grad()
    if "both" in names:
        results["dx"], results["dw"], results["db"] = run.both_grads()
    case = run.case
    taps, pixels = case.kernel[0] * case.kernel[1], case.batch * case.out_size[0] * case.out_size[1]
    terms = {"y": taps + 1, "dx": taps, "dw": pixels, "db": pixels}
    expected = dict(zip(terms, run.reference(), strict=True))
    scales = dict(zip(terms, run.reference(magnitudes=True), strict=True))
    for name, whole in results.items():
        result = run.compared(whole)
        assert not result.isnan().any(), f"{name} has elements that were not written"
        assert_rounded(result, expected[name], scales[name], min(terms[name], MOST_TERMS))


def assert_activated(run: Run, number: int) -> None:
    """Check the output with ACTIVATIONS[number - 1] applied. An activation's derivative is at most 1.2."""
    y, expected = run.forward(activation=number), reference.activate(run.reference()[0], ACTIVATIONS[number - 1])
    bound = TOLERANCE[y.dtype] * (1.2 * run.reference(magnitudes=True)[0] + 1)
    excess = ((y.double() - expected).abs() / bound).max()
    assert excess <= 1, f"error {excess:.3g} times its bound"


def moved_over_unavoidable(gpu: Gpu, case: Case) -> list[float]:
    """Bytes of the sectors that forward, data gradient and filter gradient touch in bf16.

    Each is divided by the bytes of image, output and filter.
    """
    run = Run(gpu, case, torch.bfloat16)
    unavoidable = run.x.nbytes + run.grad.nbytes + run.weight.nbytes
    ratios = []
    for call in (lambda: run.forward(with_bias=False), run.input_grad, lambda: run.weight_grad(bias=False)):
        before = gpu.moved()
        call()
        ratios.append((gpu.moved() - before) / unavoidable)
    return ratios
