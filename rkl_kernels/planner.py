"""Says which backend and kernel serve a call, and what the call costs at least."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, ops
from ._autocast import autocast
from ._backends import KERNEL_TYPES, choose
from ._checks import Activation
from ._surroundings import intercepted, transformed


@dataclass(frozen=True)
class _SeparableCall:
    """The arguments of :func:`rkl_kernels.separable_conv2d`."""

    x: Tensor
    depthwise_weight: Tensor
    pointwise_weight: Tensor
    depthwise_bias: Tensor | None = None
    pointwise_bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    inner_activation: Activation | None = None
    activation: Activation | None = None


@dataclass(frozen=True)
class Explanation:
    """How a call would be served, and the least work that it needs.

    Attributes:
        operator: the public function's name.
        backend: the backend that serves the call.
        kernel: what the backend calls: an operator of ``torch.ops``, or a function of the reference.
        bytes: bytes to move, with each input read once and each output written once.
        operations: floating-point operations, a multiply-add counted as two.
        floor: whether bytes or operations set the least time that the call can take, and why.
        fused: for a separable convolution, whether both steps are done at once, so that the depthwise output is not
            written to memory; None for the other operators.
        reason: why the steps are fused or not.
        kernels: for a depthwise convolution by a compiled backend, what computes the output (on a GPU, gradients too).

    Examples:
        >>> rk.explain("trelu", torch.zeros(100)).bytes
        800
    """

    operator: str
    backend: str
    kernel: str
    bytes: int
    operations: int
    floor: str
    fused: bool | None = None
    reason: str = ""
    kernels: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.operator}: backend {self.backend}, kernel {self.kernel}",
            f"  {self.bytes / 1e6:.3g} MB to move, {self.operations / 1e6:.3g} MFLOP; floor: {self.floor}",
        ]
        if self.reason:
            lines.append(f"  {'fused' if self.fused else 'not fused'}: {self.reason}")
        if self.kernels:
            lines.append(f"  {self.kernels}")
        return "\n".join(lines)


def explain(operator: str, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would serve ``rk.<operator>(*args, **kwargs)`` and what the call costs at least.

    The call itself is not made. ``rk.use_backend`` determines the backend, as for the call. Under ``torch.vmap`` the
    costs are those of one sample, and there is no word on kernels.

    Args:
        operator: "trelu", "depthwise_conv2d" or "separable_conv2d".
        *args: the arguments of the call; tensors may be on any device.
        **kwargs: the keyword arguments of the call.

    Returns:
        An ``Explanation`` with backend, kernel, bytes and operations; print it.

    Raises:
        TypeError: where the call itself raises it.
        ValueError: no such operator, or the call itself raises it.

    Examples:
        >>> x, weight = torch.zeros(2, 8, 10, 10), torch.zeros(8, 1, 3, 3)
        >>> with rk.use_backend("reference"):
        ...     print(rk.explain("depthwise_conv2d", x, weight, padding=1))
        depthwise_conv2d: backend reference, kernel rkl_kernels.reference.depthwise_conv2d
          0.0131 MB to move, 0.0288 MFLOP; floor: 2.2 FLOP a byte; which side binds on a CPU, `rkl bench` measures
    """
    counts: dict[str, Callable[..., _Work]] = {
        "trelu": _trelu,
        "depthwise_conv2d": _depthwise,
        "separable_conv2d": _separable,
    }
    if operator not in counts:
        raise ValueError(f"operator must be one of {', '.join(counts)}, got {operator!r}")
    args, kwargs = _cast(operator, args, kwargs)
    elements, operations, x, multiplied = counts[operator](*args, **kwargs)
    moved = elements * x.element_size()
    backend = choose(operator, x, multiplied)
    namespace = {"reference": "rkl_kernels.reference", "triton": "torch.ops.rkl_triton"}.get(backend, "torch.ops.rkl")
    fused, reason = _fusion(backend, _SeparableCall(*args, **kwargs)) if operator == "separable_conv2d" else (None, "")
    kernel, floor = f"{namespace}.{operator}", _floor(moved, operations, x)
    kernels = ""
    if operator == "depthwise_conv2d" and backend in _KERNELS and _has_memory(x):
        kernels = _KERNELS[backend](*args, **kwargs)
    return Explanation(operator, backend, kernel, moved, operations, floor, fused, reason, kernels)


@dataclass(frozen=True)
class _Rates:
    """A GPU's rates per second by its data sheet: bytes from memory, operations on tensor cores in 16 bits, and
    operations on scalar units."""

    memory: float
    tensor: float
    scalar: float


_AMPERE = _Rates(memory=2.0e12, tensor=312e12, scalar=19.5e12)  # A100 80 GB
_HOPPER = _Rates(memory=3.35e12, tensor=989e12, scalar=67e12)  # H100 SXM


def _floor(moved: int, operations: int, x: Tensor) -> str:
    """Whether memory or arithmetic binds: the call's operations a byte, against those at which both take as long."""
    intensity = operations / max(moved, 1)
    if x.device.type != "cuda":
        return f"{intensity:.2g} FLOP a byte; which side binds on a CPU, `rkl bench` measures"
    rates = _HOPPER if torch.cuda.get_device_capability(x.device) >= (9, 0) else _AMPERE
    balance = (rates.scalar if x.dtype == torch.float32 else rates.tensor) / rates.memory
    side = "memory" if intensity < balance else "arithmetic"
    return f"{side}, with {intensity:.2g} FLOP a byte where {balance:.0f} are in balance"


def _cast(operator: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments, cast as autocast would cast them for the call."""
    if operator == "trelu":
        return args, kwargs
    bound = inspect.signature(_SeparableCall if operator == "separable_conv2d" else _depthwise).bind(*args, **kwargs)
    tensors = {name: value for name, value in bound.arguments.items() if isinstance(value, Tensor)}
    if "x" in tensors:
        bound.arguments.update(zip(tensors, autocast(*tensors.values()), strict=True))
    return bound.args, bound.kwargs


def _has_memory(x: Tensor) -> bool:
    """Whether a plan can be made for ``x``: not if it is fake, or stands for many tensors in a function transform."""
    return not intercepted(x) and not transformed()


def _fusion(backend: str, call: _SeparableCall) -> tuple[bool | None, str]:
    """Whether the separable operator's forward would do both steps at once, and why."""
    if backend == "reference":
        return False, "the reference calls two convolutions"
    if backend == "triton":
        return False, "a depthwise kernel and the library's product; backward makes the depthwise output again"
    if not _has_memory(call.x):
        return None, "x has no memory that a plan could be made for"
    weight, outputs = call.depthwise_weight, call.pointwise_weight.shape[0]
    geometry, x = _geometry(call.x, weight, call.stride, call.padding, call.dilation)
    activations = [_checks.activation(n, getattr(call, n)) for n in ("inner_activation", "activation")]
    if backend == "cpu":
        window = geometry[8:10], geometry[10:12], geometry[12:14]
        plan = torch.ops.rkl.cpu_separable_plan(x, weight, outputs, *window)
        nhwc, in_nhwc, bands, gradients_in_nhwc, gradients_in_bands, filter_gradient = plan

        def said(computed_in_nhwc: int, in_bands: int, steps: str) -> str:
            turned = "images transposed to NHWC, then " if computed_in_nhwc and not nhwc else ""
            return turned + (_CPU_BANDS[computed_in_nhwc] if in_bands else steps)

        forward = said(in_nhwc, bands, _CPU_STEPS)
        backward = said(gradients_in_nhwc, gradients_in_bands, _CPU_FILTER_GRADIENTS[filter_gradient])
        return bool(bands), f"{forward}; backward: {backward}"
    with _device_of(x):
        dtype, nhwc = KERNEL_TYPES.index(x.dtype), ops.output_format(x, weight) == torch.channels_last
        plan = torch.ops.rkl.cuda_separable_plan(geometry, nhwc, outputs, *activations, dtype, _facts_of(x))
    return (True, _CUDA_FUSED) if plan else (False, _CUDA_COMPOSED)


# The rules are those of SeparablePlan and FilterGradient in csrc/cpu/separable/plan.h.
_CPU_STEPS = "the depthwise step over all images, the pointwise step over its output"
_CPU_BANDS = (
    "the pointwise step takes each band of depthwise rows while it is in the cache, where rows of NCHW images are "
    "transposed",
    "the pointwise step takes each band of depthwise rows while it is in the cache",
)
_CPU_FILTER_GRADIENTS = (
    "the depthwise output is made again, and the pointwise filter's gradient shared out by pixels and channels",
    "the depthwise output is made again, and the library makes the pointwise filter's gradient by parts of the pixels",
    "the depthwise output is made again, and the library makes the pointwise filter's gradient by output channels",
)

# The rule is in csrc/cuda/separable_plan.cpp; for contiguous images, takes_planes in csrc/cuda/plan.h.
_CUDA_FUSED = "one kernel makes the depthwise rows and multiplies them on the chip; backward makes them again"
_CUDA_COMPOSED = (
    "the one kernel serves 16-bit images, k = 3 at stride 1 or 2, k = 5 or 7 at stride 1 (contiguous images at 1 only, "
    "but for maps so small that they are transposed), no dilation, no gelu, and channels by 8 whose pointwise filter "
    "fits on the chip, up to 128 in and out for k = 3 and 64 for larger ones; else a depthwise kernel and a product: "
    "with a bias or an activation but gelu, of 16-bit images in NHWC and up to 256 channels by 8, one of ours, which "
    "finishes its outputs, else the library's; backward makes the depthwise output again"
)


# Indexed by Family in csrc/cuda/plan.h.
_CUDA_FAMILIES = (
    "the general kernel",
    "rows on the tensor cores (16 bits, NHWC)",
    "a window in registers (NHWC)",
    "planes in shared memory (NCHW)",
    "the tensor cores (filters of 9 columns and more, 16 bits)",
    "PyTorch's own convolution",  # kPyTorch in csrc/cuda/ops_cuda.cpp
)


HOPPER = [90, 132, 227 << 10, 228 << 10, 2048, 32]
"""Facts of an H100 or H200: compute capability, number of multiprocessors, shared memory of a block and of a
multiprocessor, and the threads and the blocks that a multiprocessor can hold."""


def _facts_of(x: Tensor) -> list[int]:
    """The numbers of Device in csrc/cuda/plan.h: none for the tensor's GPU, HOPPER where a CPU stands in for a GPU."""
    return [] if x.is_cuda else HOPPER


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _cuda_kernels(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> str:
    """Which kernels of the CUDA extension compute a depthwise convolution's output and gradients."""
    geometry, x = _geometry(x, weight, stride, padding, dilation)

    def family(result: int, layout: torch.memory_format) -> str:  # result: number of Result in csrc/cuda/plan.h
        nhwc = layout == torch.channels_last
        dtype = KERNEL_TYPES.index(x.dtype)
        numbers = torch.ops.rkl.cuda_depthwise_plan(geometry, nhwc, dtype, result, _facts_of(x), bias is not None)
        if not numbers:
            return ""
        transposed = "transposed to NHWC, " if numbers[-1] and not nhwc else ""
        return transposed + _CUDA_FAMILIES[numbers[0]]

    with _device_of(x):
        forward = family(0, ops.output_format(x, weight))
        data, filter_, both = (family(result, ops.output_format(x, x)) for result in (1, 2, 3))
    if both:
        return f"output: {forward}; gradients of image and filter in one pass: {both}"
    if data == filter_:
        return f"output: {forward}; gradients of image and filter: {data}"
    return f"output: {forward}; image's gradient: {data}; filter's gradient: {filter_}"


def _cpu_kernels(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> str:
    """Which kernels compute a depthwise convolution's output on a CPU."""
    geometry, x = _geometry(x, weight, stride, padding, dilation)
    window = geometry[8:10], geometry[10:12], geometry[12:14]
    by_pytorch = torch.ops.rkl.cpu_depthwise_by_pytorch(x, weight, *window)
    return "output: PyTorch's own convolution, the faster one here" if by_pytorch else "output: windows that slide"


_KERNELS: dict[str, Callable[..., str]] = {"cuda": _cuda_kernels, "cpu": _cpu_kernels}


class _Work(NamedTuple):
    """The least work of a call: elements read and written, and operations. Also the batched image, and whether each of
    its channels has several filters."""

    elements: int
    operations: int
    x: Tensor
    multiplied: bool = False


def _trelu(x: Tensor, inplace: bool = False) -> _Work:
    _checks.floating("x", x)
    return _Work(2 * x.numel(), x.numel(), x)


def _geometry(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> tuple[list[int], Tensor]:
    """The fields of Conv2d in csrc/geometry.h, in their order, and the batched image."""
    window = _checks.depthwise(x, weight, None, stride, padding, dilation)
    x = window.pad_extra(x if x.dim() == 4 else x[None])
    kernel, (steps, padded, apart) = weight.shape[2:], window[:3]
    size = ops.output_size(x, kernel, steps, padded, apart)
    # As conv2d in csrc/tensor_args.h: one output has no stride to the next, and one tap no dilation.
    places = ops.output_size(x, kernel, (1, 1), padded, apart)
    step = [min(s, n) for s, n in zip(steps, places, strict=True)]
    between = [d if taps > 1 else 1 for d, taps in zip(apart, kernel, strict=True)]
    return [*x.shape, *size, *kernel, *step, *padded, *between], x


def _image(*args: Any) -> tuple[int, Tensor]:
    """Output pixels of the whole batch, and the batched image."""
    (n, _, _, _, height, width, *_), x = _geometry(*args)
    return n * height * width, x


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> _Work:
    window = _checks.depthwise(x, weight, bias, stride, padding, dilation)
    pixels, x = _image(x, weight, stride, padding, dilation)
    outputs = pixels * weight.shape[0]
    elements = x.numel() + weight.numel() + _elements(bias) + outputs
    return _Work(elements, 2 * outputs * weight[0].numel(), x, window.multiplied)


def _elements(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.numel()


def _separable(*args: Any, **kwargs: Any) -> _Work:
    call = _SeparableCall(*args, **kwargs)
    weights = call.depthwise_weight, call.pointwise_weight, call.depthwise_bias, call.pointwise_bias
    for name in ("inner_activation", "activation"):
        _checks.activation(name, getattr(call, name))
    _checks.separable(call.x, *weights, call.stride, call.padding, call.dilation)
    pixels, x = _image(call.x, call.depthwise_weight, call.stride, call.padding, call.dilation)
    taps = call.depthwise_weight.numel() + call.pointwise_weight.numel()
    biases = _elements(call.depthwise_bias) + _elements(call.pointwise_bias)
    elements = x.numel() + taps + biases + pixels * call.pointwise_weight.shape[0]
    return _Work(elements, 2 * pixels * taps, x)
