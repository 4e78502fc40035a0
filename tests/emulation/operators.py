"""The operators on the emulated GPU, in a namespace of torch.ops. They copy CPU tensors into the device's memory.

This stands in for csrc/cuda/ops_cuda.cpp, which needs a GPU. It computes in the same layouts, fused or step by step,
with the same workspaces. PyTorch transposes and multiplies here, where a GPU runs transpose.cu, pointwise.cu and the
libraries, and nothing is left to cuDNN. Only tests/gpu, on a GPU, runs those parts of ops_cuda.cpp.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rkl_kernels import ops, planner
from rkl_kernels._backends import choose

from .conftest import Gpu

NHWC, NCHW = torch.channels_last, torch.contiguous_format
PAIRS = ("in", "out", "kernel", "stride", "padding", "dilation")
GEOMETRY = ("batch", "channels", *(f"{name}_{axis}" for name in PAIRS for axis in "hw"))
Pair = list[int]
Maybe = Tensor | None


def image_format(x: Tensor) -> torch.memory_format:
    return ops.output_format(x, x)


def pixel_rows(image: Tensor) -> Tensor:
    """A view of a dense NHWC image as a matrix of pixels by channels."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


class Operators:
    """The operators. ``launches`` counts the launches of each GPU kernel."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.launches: Counter[str] = Counter()

    def _call(self, kernel: str, *arguments: Any) -> Any:
        """Call a kernel's launcher with tensors as pointers and None as null."""
        passed = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
        return getattr(self.gpu.kernels, kernel)(*passed)

    def _put(self, x: Maybe, format: torch.memory_format = NCHW) -> Maybe:
        return None if x is None else self.gpu.put(x.detach().contiguous(memory_format=format))

    def _image(self, like: Tensor, channels: int, height: int, width: int, nhwc: bool = True) -> Tensor:
        return self.gpu.empty(like.shape[0], channels, height, width, dtype=like.dtype, nhwc=nhwc)

    def _fetch(self, x: Tensor, format: torch.memory_format = NCHW) -> Tensor:
        return x.clone(memory_format=format)

    def _finish(self) -> None:
        """Count the launches and free the device's memory."""
        self.launches.update({name: traffic.launches for name, traffic in self.gpu.traffic().items()})
        self.gpu.kernels.reset()

    def _geometry(self, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, nhwc: bool) -> Any:
        numbers, _ = planner._geometry(x, weight, stride, padding, dilation)
        return self.gpu.kernels.Conv2d(**dict(zip(GEOMETRY, numbers, strict=True)), nhwc=nhwc)

    def _planned(self, x: Tensor, weight: Tensor, *window: Pair, nhwc: bool, of_filter: bool) -> tuple[Any, bool]:
        """A depthwise call's geometry, and whether it is computed in NHWC. Images may be transposed for that."""
        g = self._geometry(x, weight, *window, nhwc=nhwc)
        if nhwc or not self.gpu.kernels.transposes(g, self.gpu.dtype(x.dtype), of_filter):
            return g, nhwc
        return self._geometry(x, weight, *window, nhwc=True), True

    def _separable_in_nhwc(self, x: Tensor, weight: Tensor, *window: Pair, backward: bool) -> bool:
        if NHWC in (ops.output_format(x, weight), image_format(x)):
            return True
        g = self._geometry(x, weight, *window, nhwc=False)
        return not self.gpu.kernels.takes_planes(g, self.gpu.dtype(x.dtype), backward)

    def trelu(self, x: Tensor) -> Tensor:
        y = self._put(x.flatten())
        self._call("trelu", y, y, x.numel(), self.gpu.dtype(x.dtype), 0)
        out = torch.empty_like(x).copy_(y.view(x.shape))
        self._finish()
        return out

    def trelu_(self, x: Tensor) -> None:
        x.copy_(self.trelu(x))

    def trelu_backward(self, grad: Tensor, y: Tensor) -> Tensor:
        dx = self._put(grad.flatten())
        self._call("trelu_backward", dx, self._put(y.flatten()), dx, y.numel(), self.gpu.dtype(y.dtype), 0)
        out = torch.empty_like(y).copy_(dx.view(y.shape))
        self._finish()
        return out

    def depthwise_conv2d(self, x: Tensor, weight: Tensor, bias: Maybe, *window: Pair) -> Tensor:
        format = ops.output_format(x, weight)
        g, nhwc = self._planned(x, weight, *window, nhwc=format == NHWC, of_filter=False)
        out_h, out_w = ops.output_size(x, weight.shape[2:], *window)
        y, x_in = self._image(x, x.shape[1], out_h, out_w, nhwc), self._put(x, NHWC if nhwc else NCHW)
        self._call("depthwise", g, x_in, self._put(weight), self._put(bias), 0, y, self.gpu.dtype(x.dtype), 0)
        out = self._fetch(y, format)
        self._finish()
        return out

    def _depthwise_backward(
        self, g: Any, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool], nhwc: bool
    ) -> tuple[Tensor, ...]:
        """The gradients of tensors that are already on the device. Unwanted ones are empty."""
        number, nothing = self.gpu.dtype(x.dtype), x.new_empty(0)
        dx = self._image(x, *x.shape[1:], nhwc=nhwc) if mask[0] else None
        dw = self.gpu.empty(*weight.shape, dtype=x.dtype) if mask[1] else None
        db = self.gpu.empty(x.shape[1], dtype=x.dtype) if mask[2] else None
        plan = self._call("plan_depthwise_backward", g, grad, x, dx, dw, db, number)
        workspace = self.gpu.empty(plan.workspace(g))
        self._call("depthwise_backward", plan, g, grad, x, weight, dx, dw, db, workspace, number, 0)
        return tuple(nothing if t is None else t for t in (dx, dw, db))

    def depthwise_conv2d_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, mask: list[bool]
    ) -> tuple[Tensor, ...]:
        format, window = image_format(x), (stride, padding, dilation)
        g, nhwc = self._geometry(x, weight, *window, nhwc=format == NHWC), format == NHWC
        if mask[0] or mask[1]:
            g, nhwc = self._planned(x, weight, *window, nhwc=nhwc, of_filter=mask[1])
        images = (self._put(t, NHWC if nhwc else NCHW) for t in (grad, x))
        made = self._depthwise_backward(g, *images, self._put(weight), mask, nhwc)
        fetched = [self._fetch(t, f) for t, f in zip(made, (format if mask[0] else NCHW, NCHW, NCHW), strict=True)]
        self._finish()
        return fetched[0], self._as_filter(fetched[1], weight), fetched[2]

    @staticmethod
    def _as_filter(grad: Tensor, weight: Tensor) -> Tensor:
        return grad.view(weight.shape).contiguous(memory_format=image_format(weight)) if grad.numel() else grad

    def separable_conv2d(
        self, x: Tensor, dw: Tensor, pw: Tensor, db: Maybe, pb: Maybe,
        stride: Pair, padding: Pair, dilation: Pair, inner: int, activation: int,
    ) -> Tensor:  # fmt: skip
        number, c_out, window = self.gpu.dtype(x.dtype), pw.shape[0], (stride, padding, dilation)
        nhwc = self._separable_in_nhwc(x, dw, *window, backward=False)
        g = self._geometry(x, dw, *window, nhwc=nhwc)
        out_h, out_w = ops.output_size(x, dw.shape[2:], *window)
        x_in, pw_in = self._put(x, NHWC if nhwc else NCHW), self._put(pw.flatten(1))
        dw_in, db_in, pb_in = map(self._put, (dw, db, pb))
        y = self._image(x, c_out, out_h, out_w, nhwc)
        device = self.gpu.kernels.current_device()
        plan = nhwc and self._call("plan_separable", g, c_out, inner, activation, number, True, device)
        if plan:
            tensors = (x_in, dw_in, pw_in, db_in, pb_in)
            self._call("fused_separable", plan, g, c_out, *tensors, inner, activation, y, number, 0)
        else:
            depthwise_out = self._image(x, x.shape[1], out_h, out_w, nhwc)
            self._call("depthwise", g, x_in, dw_in, db_in, inner, depthwise_out, number, 0)
            self._pointwise(depthwise_out, pw_in, y, nhwc)
            if nhwc:
                self._call("epilogue", y, pb_in, activation, y, *pixel_rows(y).shape, number, 0)
            else:
                sizes = x.shape[0], c_out, out_h * out_w
                self._call("plane_epilogue", y, pb_in, activation, y, *sizes, number, 0)
        out = self._fetch(y, ops.output_format(x, dw))
        self._finish()
        return out

    @staticmethod
    def _pointwise(image: Tensor, filter: Tensor, out: Tensor, nhwc: bool) -> None:
        """One product over all pixels of NHWC images, or a batch of products over planes."""
        if nhwc:
            torch.mm(pixel_rows(image), filter.t(), out=pixel_rows(out))
        else:
            torch.bmm(filter.expand(len(image), *filter.shape), image.flatten(2), out=out.flatten(2))

    def separable_conv2d_backward(
        self, grad: Tensor, y: Maybe, x: Tensor, dw: Tensor, pw: Tensor, db: Maybe,
        stride: Pair, padding: Pair, dilation: Pair, inner: int, activation: int, mask: list[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        (c_out, c), window = pw.shape[:2], (stride, padding, dilation)
        nhwc = self._separable_in_nhwc(x, dw, *window, backward=True)
        g, format = self._geometry(x, dw, *window, nhwc=nhwc), NHWC if nhwc else NCHW
        grad_in, x_in = self._put(grad, format), self._put(x, format)
        y_in = self._put(y, format) if activation else None
        dw_in, pw_in, db_in = map(self._put, (dw, pw.flatten(1), db))
        d_inner = self._image(x, c, *grad.shape[2:], nhwc)
        d_pw, d_pb = self.gpu.empty(c_out, c, dtype=x.dtype), self.gpu.empty(c_out, dtype=x.dtype)
        tensors = (grad_in, y_in, x_in, dw_in, pw_in, db_in)
        self._pointwise_backward(g, *tensors, inner, activation, d_inner, d_pw, d_pb, nhwc)
        depthwise_mask = [mask[0], mask[1], mask[3]]
        dx, d_dw, d_db = self._depthwise_backward(g, d_inner, x_in, dw_in, depthwise_mask, nhwc)
        results = (
            self._fetch(dx, image_format(x)) if mask[0] else x.new_empty(0),
            self._as_filter(self._fetch(d_dw), dw),
            self._as_filter(self._fetch(d_pw), pw) if mask[2] else x.new_empty(0),
            self._fetch(d_db),
            self._fetch(d_pb) if mask[4] else x.new_empty(0),
        )
        self._finish()
        return results

    def _pointwise_backward(
        self, g: Any, grad: Tensor, y: Maybe, x: Tensor, dw: Tensor, pw: Tensor, db: Maybe,
        inner: int, activation: int, d_inner: Tensor, d_pw: Tensor, d_pb: Tensor, nhwc: bool,
    ) -> None:  # fmt: skip
        number = self.gpu.dtype(x.dtype)
        depthwise_out, activated = (self._image(x, *d_inner.shape[1:], nhwc) for _ in range(2))
        if activation:
            self._call("activation_backward", grad, y, activation, True, grad, grad.numel(), number, 0)
        n, c_out, pixels = grad.flatten(2).shape
        sizes, kind = ((n * pixels, c_out), "column_sums") if nhwc else ((n, c_out, pixels), "plane_sums")
        self._call(kind, grad, d_pb, *sizes, self.gpu.empty(self._call(f"{kind}_workspace", *sizes)), number, 0)
        self._call("depthwise", g, x, dw, db, 0, depthwise_out, number, 0)
        self._call("epilogue", depthwise_out, None, inner, activated, n * pixels, x.shape[1], number, 0)
        self._pointwise_filter_gradient(grad, activated, d_pw, nhwc)
        self._pointwise(grad, pw.t(), d_inner, nhwc)
        if inner:
            self._call("activation_backward", d_inner, depthwise_out, inner, False, d_inner, d_inner.numel(), number, 0)

    def _pointwise_filter_gradient(self, grad: Tensor, image: Tensor, d_pw: Tensor, nhwc: bool) -> None:
        n, c, pixels = image.flatten(2).shape
        if nhwc or d_pw.numel() >= (len(d_pw) + c) * pixels:
            torch.mm(pixel_rows(grad).t(), pixel_rows(image), out=d_pw)
            return
        products = self.gpu.empty(n, d_pw.numel(), dtype=d_pw.dtype)  # one for each image, then their sum
        torch.bmm(grad.flatten(2), image.flatten(2).mT, out=products.view(n, *d_pw.shape))
        workspace = self.gpu.empty(self._call("column_sums_workspace", *products.shape))
        self._call("column_sums", products, d_pw, *products.shape, workspace, self.gpu.dtype(d_pw.dtype), 0)


rkl_emulated = ops.define("rkl_emulated")


@contextmanager
def serving(operators: Operators) -> Iterator[None]:
    """Let the emulated kernels serve every call of the public functions except the reference's."""

    def namespace_for(operator: str, x: Tensor, multiplied: bool = False) -> Any:
        return None if choose(operator, x, multiplied) == "reference" else rkl_emulated

    library = register(operators)
    with ExitStack() as patches:
        for module in ("_trelu", "depthwise", "separable"):
            patched = mock.patch.object(sys.modules[f"rkl_kernels.{module}"], "namespace_for", namespace_for)
            patches.enter_context(patched)
        # These questions open a shortcut to the CPU's kernels.
        shorter = {"_trelu": "is_built", "depthwise": "is_served", "separable": "is_served"}
        for module, question in shorter.items():
            patched = mock.patch.object(sys.modules[f"rkl_kernels.{module}"], question, return_value=False)
            patches.enter_context(patched)
        yield
    library._destroy()


def register(operators: Operators) -> torch.library.Library:
    """Register the kernels for :data:`rkl_emulated`, until the returned library is destroyed."""
    library = torch.library.Library("rkl_emulated", "IMPL")
    for name in ops.SCHEMAS:
        library.impl(name, getattr(operators, name), "CPU")
    return library
