"""Triton's interpreter with corrected arithmetic. A test imports it before any kernel runs.

The stock interpreter (3.6 and 3.7) takes bfloat16 for bit patterns: it adds and multiplies the patterns, and its casts
cut instead of round. Its minimum and maximum treat NaN as NumPy does, not as a GPU does. It also accepts what is
undefined on a GPU; the sanitizer (sanitizer.py) refuses that.

Here every operation on bfloat16 is done in float32 and rounded once, to nearest, ties to even, as the hardware does.
Only tl.dot, which no kernel calls, is left as it was.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}
PLAIN_FLOATS = {"bf16", "fp16", "fp32", "fp64"}


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16 bit patterns, to nearest, ties to even. NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def values(handle: Any) -> np.ndarray:
    """The handle's numbers, in a type that NumPy can compute with."""
    return widen(handle.data) if is_bf16(handle) else handle.data


def _cast(self: Any, source: Any, target: Any) -> Any:
    data, target = values(source), target.scalar
    if target == tl.bfloat16:
        return Handle(source.data if is_bf16(source) else narrow(data), target)
    return Handle(data.astype(interpreter._get_np_dtype(target)), target)


def _convert(stock: Any) -> Any:
    def convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        plain = {source.dtype.scalar.name, target.scalar.name} <= PLAIN_FLOATS
        return _cast(self, source, target) if plain else stock(self, source, target, rounding)

    return convert


def _unary(stock: Any) -> Any:
    def unary(self: Any, x: Any, operation: Any) -> Any:
        return Handle(narrow(operation(values(x))), tl.bfloat16) if is_bf16(x) else stock(self, x, operation)

    return unary


def _absolute(stock: Any) -> Any:
    def absolute(self: Any, x: Any) -> Any:
        return Handle(x.data & np.uint16(0x7FFF), tl.bfloat16) if is_bf16(x) else stock(self, x)

    return absolute


def _binary(stock: Any) -> Any:
    def binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if not (is_bf16(left) and is_bf16(right)) or operation in BITWISE:
            return stock(self, left, right, operation)
        result = operation(values(left), values(right))
        return Handle(result, tl.int1) if operation in COMPARISONS else Handle(narrow(result), tl.bfloat16)

    return binary


def _ternary(stock: Any) -> Any:
    def ternary(self: Any, a: Any, b: Any, c: Any, operation: Any) -> Any:
        if operation is np.where or not is_bf16(c):
            return stock(self, a, b, c, operation)
        return Handle(narrow(operation(values(a), values(b), values(c))), tl.bfloat16)

    return ternary


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """One rounding, as in hardware: the product of two floats is exact in the next wider type."""
    exact = values(x).astype(np.float64) * values(y) + values(z)
    data = narrow(exact.astype(np.float32)) if is_bf16(z) else exact.astype(z.data.dtype)
    return Handle(data, z.dtype.scalar)


def _clamp(self: Any, x: Any, low: Any, high: Any, propagate_nan: Any) -> Any:
    if "ALL" in str(propagate_nan):
        return self.ternary_op(x, low, high, lambda v, a, b: np.minimum(np.maximum(v, a), b))
    return self.ternary_op(x, low, high, lambda v, a, b: np.fmin(np.fmax(v, a), b))


def _sum(stock: Any) -> Any:
    def total(self: Any, x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return stock(self, x)
        sums = np.sum(widen(x.handle.data), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrow(sums), x.dtype)

    return total


def _index_of_scalars(stock: Any) -> Any:
    """Triton 3.6 calls int() on an array of one element, which NumPy 2.4 refuses."""

    def patch(tensor: Any, *scope: Any) -> Any:
        stock(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patch


def _restore(stock: Any) -> Any:
    """Results are written in place. Copying each tensor onto itself would touch every page of a very large one."""

    def restore(self: Any, args: Any, host_args: Any, kwargs: Any, host_kwargs: Any) -> None:
        return None

    return restore


def install() -> None:
    """Put the corrections in, once for a process."""
    Builder.cast_impl = _cast
    Builder.create_fp_to_fp = _convert(Builder.create_fp_to_fp)
    Builder.unary_op = _unary(Builder.unary_op)
    Builder.create_fabs = _absolute(Builder.create_fabs)
    Builder.binary_op = _binary(Builder.binary_op)
    Builder.ternary_op = _ternary(Builder.ternary_op)
    Builder.create_fma = _fma
    Builder.create_clampf = _clamp
    # maxnum and minnum drop NaN (IEEE maxNum), maximum and minimum keep it.
    Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    interpreter.ReduceOps.sum = _sum(interpreter.ReduceOps.sum)
    interpreter._patch_lang_tensor = _index_of_scalars(interpreter._patch_lang_tensor)
    interpreter.GridExecutor._restore_args_dev = _restore(interpreter.GridExecutor._restore_args_dev)


install()
