"""The operators on the emulated GPU, over CPU tensors that are copied into the device's memory: what
csrc/cuda/ops_cuda.cpp does on a GPU (layouts, fused or step by step, workspaces), for a namespace of torch.ops."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rkl_kernels import ops
from rkl_kernels._backends import choose

from .conftest import Gpu

NHWC, NCHW = torch.channels_last, torch.contiguous_format
Pair = list[int]
Maybe = Tensor | None


def image_format(x: Tensor) -> torch.memory_format:
    return ops.output_format(x, x)


def pixel_rows(image: Tensor) -> Tensor:
    """A dense NHWC image as a matrix of pixels by channels: a view."""
    return image.permute(0, 2, 3, 1).flatten(0, 2)


class Operators:
    """The operators' kernels; ``launches`` counts those of each GPU kernel."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.launches: Counter[str] = Counter()

    def _call(self, kernel: str, *arguments: Any) -> Any:
        """Tensors go as pointers, None as null."""
        passed = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
        return getattr(self.gpu.kernels, kernel)(*passed)

    def _put(self, x: Maybe, format: torch.memory_format = NCHW) -> Maybe:
        return None if x is None else self.gpu.put(x.detach().contiguous(memory_format=format))

    def _image(self, like: Tensor, channels: int, height: int, width: int, nhwc: bool = True) -> Tensor:
        return self.gpu.empty(like.shape[0], channels, height, width, dtype=like.dtype, nhwc=nhwc)

    def _fetch(self, x: Tensor, format: torch.memory_format = NCHW) -> Tensor:
        return x.clone(memory_format=format)

    def _finish(self) -> None:
        """Counts the launches and frees the device's memory."""
        self.launches.update({name: traffic.launches for name, traffic in self.gpu.traffic().items()})
        self.gpu.kernels.reset()

    def _geometry(self, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, nhwc: bool) -> Any:
        out_h, out_w = ops.output_size(x, weight.shape[2:], stride, padding, dilation)
        pairs = {"kernel": weight.shape[2:], "stride": stride, "padding": padding, "dilation": dilation}
        named = {f"{name}_{axis}": pair[i] for name, pair in pairs.items() for i, axis in enumerate("hw")}
        n, c, in_h, in_w = x.shape
        return self.gpu.kernels.Conv2d(
            batch=n, channels=c, in_h=in_h, in_w=in_w, out_h=out_h, out_w=out_w, nhwc=nhwc, **named
        )

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
        g = self._geometry(x, weight, *window, nhwc=format == NHWC)
        out_h, out_w = ops.output_size(x, weight.shape[2:], *window)
        y = self._image(x, x.shape[1], out_h, out_w, nhwc=format == NHWC)
        self._call(
            "depthwise", g, self._put(x, format), self._put(weight), self._put(bias), 0, y, self.gpu.dtype(x.dtype), 0
        )
        out = self._fetch(y, format)
        self._finish()
        return out

    def _depthwise_backward(
        self, g: Any, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool], nhwc: bool
    ) -> tuple[Tensor, ...]:
        """The gradients of tensors that are on the device already; empty where not wanted."""
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
        format = image_format(x)
        g = self._geometry(x, weight, stride, padding, dilation, nhwc=format == NHWC)
        made = self._depthwise_backward(
            g, self._put(grad, format), self._put(x, format), self._put(weight), mask, format == NHWC
        )
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
        number, c_out = self.gpu.dtype(x.dtype), pw.shape[0]
        g = self._geometry(x, dw, stride, padding, dilation, nhwc=True)
        out_h, out_w = ops.output_size(x, dw.shape[2:], stride, padding, dilation)
        x_in, dw_in, pw_in, db_in, pb_in = self._put(x, NHWC), *map(self._put, (dw, pw.flatten(1), db, pb))
        y = self._image(x, c_out, out_h, out_w)
        plan = self._call(
            "plan_separable", g, c_out, inner, activation, number, True, self.gpu.kernels.current_device()
        )
        if plan:
            tensors = (x_in, dw_in, pw_in, db_in, pb_in)
            self._call("fused_separable", plan, g, c_out, *tensors, inner, activation, y, number, 0)
        else:
            depthwise_out = self._image(x, x.shape[1], out_h, out_w)
            self._call("depthwise", g, x_in, dw_in, db_in, inner, depthwise_out, number, 0)
            torch.mm(pixel_rows(depthwise_out), pw_in.t(), out=pixel_rows(y))
            self._call("epilogue", y, pb_in, activation, y, *pixel_rows(y).shape, number, 0)
        out = self._fetch(y, ops.output_format(x, dw))
        self._finish()
        return out

    def separable_conv2d_backward(
        self, grad: Tensor, y: Maybe, x: Tensor, dw: Tensor, pw: Tensor, db: Maybe,
        stride: Pair, padding: Pair, dilation: Pair, inner: int, activation: int, mask: list[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        c_out, c = pw.shape[:2]
        g = self._geometry(x, dw, stride, padding, dilation, nhwc=True)
        grad_in, x_in = self._put(grad, NHWC), self._put(x, NHWC)
        y_in = self._put(y, NHWC) if activation else None
        dw_in, pw_in, db_in = map(self._put, (dw, pw.flatten(1), db))
        d_inner = self._image(x, c, *grad.shape[2:])
        d_pw, d_pb = self.gpu.empty(c_out, c, dtype=x.dtype), self.gpu.empty(c_out, dtype=x.dtype)
        tensors = (grad_in, y_in, x_in, dw_in, pw_in, db_in)
        self._pointwise_backward(g, *tensors, inner, activation, d_inner, d_pw, d_pb)
        depthwise_mask = [mask[0], mask[1], mask[3]]
        dx, d_dw, d_db = self._depthwise_backward(g, d_inner, x_in, dw_in, depthwise_mask, nhwc=True)
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
        inner: int, activation: int, d_inner: Tensor, d_pw: Tensor, d_pb: Tensor,
    ) -> None:  # fmt: skip
        number = self.gpu.dtype(x.dtype)
        rows, depthwise_out = pixel_rows(grad), self._image(x, *d_inner.shape[1:])
        if activation:
            self._call("activation_backward", grad, y, activation, True, grad, grad.numel(), number, 0)
        workspace = self.gpu.empty(self._call("column_sums_workspace", *rows.shape))
        self._call("column_sums", grad, d_pb, *rows.shape, workspace, number, 0)
        self._call("depthwise", g, x, dw, db, 0, depthwise_out, number, 0)
        activated = self._image(x, *depthwise_out.shape[1:])
        self._call("epilogue", depthwise_out, None, inner, activated, *pixel_rows(depthwise_out).shape, number, 0)
        torch.mm(rows.t(), pixel_rows(activated), out=d_pw)
        torch.mm(rows, pw, out=pixel_rows(d_inner))
        if inner:
            self._call("activation_backward", d_inner, depthwise_out, inner, False, d_inner, d_inner.numel(), number, 0)


rkl_emulated = ops.define("rkl_emulated")


@contextmanager
def serving(operators: Operators) -> Iterator[None]:
    """The emulated kernels, serving every call of the public functions but the reference's."""

    def namespace_for(operator: str, x: Tensor, multiplied: bool = False) -> Any:
        return None if choose(operator, x, multiplied) == "reference" else rkl_emulated

    library = register(operators)
    with ExitStack() as patches:
        for module in ("_trelu", "depthwise", "separable"):
            patched = mock.patch.object(sys.modules[f"rkl_kernels.{module}"], "namespace_for", namespace_for)
            patches.enter_context(patched)
        shorter = {"_trelu": "is_built", "depthwise": "is_served", "separable": "is_served"}  # to the CPU
        for module, question in shorter.items():
            patched = mock.patch.object(sys.modules[f"rkl_kernels.{module}"], question, return_value=False)
            patches.enter_context(patched)
        yield
    library._destroy()


def register(operators: Operators) -> torch.library.Library:
    """Puts the kernels behind :data:`rkl_emulated`, until the library that it returns is destroyed."""
    library = torch.library.Library("rkl_emulated", "IMPL")
    for name in ops.SCHEMAS:
        library.impl(name, getattr(operators, name), "CPU")
    return library
