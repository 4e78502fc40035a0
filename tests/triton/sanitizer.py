"""Memory checks for interpreted Triton kernels. What a GPU would do silently becomes an error here:

- a load or store outside the storages of the tensors that the kernel was given;
- a load or store not aligned to its element;
- two programs, or two lanes of one store, that write the same element, and a program that reads what another writes.

Lanes that a load masks out without ``other`` are undefined on a GPU. Here they are NaN, or the largest integer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton.language as tl
from interpreter import Builder, Handle, is_bf16
from triton.runtime import interpreter

NOBODY, SEVERAL = 0, -1


class MemoryFaultError(Exception):
    """A kernel touched memory that it must not touch."""


@dataclass
class Storage:
    """A tensor's storage during one launch, and for each element the programs that wrote and read it.

    Programs are numbered from 1. np.zeros makes these shadows and takes memory page by page, so the shadows of a huge
    tensor take memory only where it is touched.
    """

    begin: int
    end: int
    writer: np.ndarray | None = None
    reader: np.ndarray | None = None

    def shadows(self, element: int) -> tuple[np.ndarray, np.ndarray]:
        if self.writer is None:
            size = (self.end - self.begin) // element
            self.writer, self.reader = np.zeros(size, np.int32), np.zeros(size, np.int32)
        return self.writer, self.reader


@dataclass
class Launch:
    """The storages of the running launch, and the numbers of its programs."""

    storages: list[Storage] = field(default_factory=list)
    programs: dict[tuple[int, ...], int] = field(default_factory=dict)

    def number(self, program: tuple[int, ...]) -> int:
        return self.programs.setdefault(program, len(self.programs) + 1)


current = Launch()


def _begin(stock: Any) -> Any:
    def begin(self: Any, args: Any, kwargs: Any) -> Any:
        global current
        host_args, host_kwargs = stock(self, args, kwargs)
        current = Launch()

        def walk(value: Any) -> None:
            if isinstance(value, (tuple, list)):
                for item in value:
                    walk(item)
            elif hasattr(value, "data_ptr"):
                storage = interpreter._unwrap_tensor(value).untyped_storage()
                begin = storage.data_ptr()
                if all(known.begin != begin for known in current.storages):
                    current.storages.append(Storage(begin, begin + storage.nbytes()))

        walk([*host_args, *host_kwargs.values()])
        return host_args, host_kwargs

    return begin


def _live(pointers: Any, mask: Any) -> np.ndarray:
    """Addresses of the lanes that are not masked out."""
    if mask is None:
        return pointers.data.ravel()
    return pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]


def _locate(addresses: np.ndarray, size: int, what: str) -> list[tuple[Storage, np.ndarray]]:
    """The numbers of the addressed elements in each storage.

    Raises:
        MemoryFaultError: an address lies in no storage, or between two elements.
    """
    found, left = [], np.ones(addresses.shape, bool)
    for storage in current.storages:
        inside = (addresses >= storage.begin) & (addresses + np.uint64(size) <= storage.end)
        if inside.any():
            found.append(
                (storage, ((addresses[inside] - np.uint64(storage.begin)) // np.uint64(size)).astype(np.int64))
            )
        left &= ~inside
    if left.any():
        nearest = min(int(addresses[left][0]) - storage.begin for storage in current.storages)
        raise MemoryFaultError(
            f"out-of-bounds {what}: {int(left.sum())} lanes, one {nearest} bytes from a tensor's begin"
        )
    if (addresses % np.uint64(size)).any():
        raise MemoryFaultError(f"misaligned {what} of {size} bytes")
    return found


def _size(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _load(stock: Any) -> Any:
    def load(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        addresses = _live(pointers, mask)
        me = current.number(self.grid_idx)
        for storage, elements in _locate(addresses, _size(pointers), f"load in program {self.grid_idx}"):
            writer, reader = storage.shadows(_size(pointers))
            foreign = (writer[elements] != NOBODY) & (writer[elements] != me)
            if foreign.any():
                raise MemoryFaultError(f"program {self.grid_idx} reads what another program writes")
            before = reader[elements]
            reader[elements] = np.where((before == NOBODY) | (before == me), me, SEVERAL)
        if other is None and mask is not None and not mask.data.all():
            other = _poison(pointers)
        return stock(self, pointers, mask, other, *options)

    return load


def _poison(pointers: Any) -> Any:
    """The value of undefined lanes: NaN, or the largest integer."""
    kind = pointers.get_element_ty()
    data = np.dtype(interpreter._get_np_dtype(kind))
    if kind == tl.bfloat16:
        return Handle(np.full(pointers.data.shape, 0x7FC0, data), kind)
    fill = np.nan if data.kind == "f" else np.iinfo(data).max if data.kind in "iu" else True
    return Handle(np.full(pointers.data.shape, fill, data), kind)


def _store(stock: Any) -> Any:
    def store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        addresses = _live(pointers, mask)
        if np.unique(addresses).size != addresses.size:
            raise MemoryFaultError(f"two lanes of program {self.grid_idx} store to one element")
        me = current.number(self.grid_idx)
        for storage, elements in _locate(addresses, _size(pointers), f"store in program {self.grid_idx}"):
            writer, reader = storage.shadows(_size(pointers))
            if ((writer[elements] != NOBODY) & (writer[elements] != me)).any():
                raise MemoryFaultError(f"program {self.grid_idx} stores where another program has stored")
            if ((reader[elements] != NOBODY) & (reader[elements] != me)).any():
                raise MemoryFaultError(f"program {self.grid_idx} stores where another program reads")
            writer[elements] = me
        return stock(self, pointers, value, mask, *options)

    return store


def _atomic(stock: Any) -> Any:
    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        _locate(_live(pointers, mask), _size(pointers), f"atomic in program {self.grid_idx}")
        if is_bf16(value):
            raise MemoryFaultError("the interpreter has no bfloat16 atomics")
        return stock(self, operation, pointers, value, mask, *options)

    return atomic


def install() -> None:
    """Put the checks in, once for a process."""
    interpreter.GridExecutor._init_args_hst = _begin(interpreter.GridExecutor._init_args_hst)
    Builder.create_masked_load = _load(Builder.create_masked_load)
    Builder.create_masked_store = _store(Builder.create_masked_store)
    Builder.create_atomic_rmw = _atomic(Builder.create_atomic_rmw)


install()
