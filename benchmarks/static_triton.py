"""Every Triton kernel, compiled ahead of time for sm_80 and sm_90: registers, spills, shared memory, instructions.

No GPU is needed: the operators' own host code runs on tensors without data, and each launch is compiled instead of run,
with the argument specialisation of the real launch. The figures guard against regressions. They are no claims of speed.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.static_report import LIMITS, blocks_per_multiprocessor
from rkl_kernels.triton import depthwise, launch, trelu, window

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class _Driver:
    """Stands in for a GPU's driver, as far as the compiler uses one."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # or kernels compiled for one architecture would be taken for the other

    def get_current_stream(self, device: int) -> int:
        return 0


def _image(channels: int, size: int, dtype: torch.dtype, batch: int = 64, nhwc: bool = True) -> torch.Tensor:
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(batch, channels, size, size, dtype=dtype, device="meta").contiguous(memory_format=layout)


def _filter(channels: int, kernel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(channels, 1, kernel, kernel, dtype=dtype, device="meta")


def _depthwise(channels: int, size: int, kernel: int, dtype: torch.dtype, stride: int = 1, nhwc: bool = True,
               batch: int = 64) -> None:  # fmt: skip
    x, weight = _image(channels, size, dtype, batch, nhwc), _filter(channels, kernel, dtype)
    window = [stride] * 2, [kernel // 2] * 2, [1, 1]
    y = depthwise.depthwise_conv2d(x, weight, None, *window)
    depthwise.depthwise_conv2d_backward(y, x, weight, *window, [True] * 3)


def _trelu(dtype: torch.dtype) -> None:
    x = torch.empty(1 << 24, dtype=dtype, device="meta")
    trelu.trelu(x)
    trelu.trelu_backward(x, x)


# One call for every kernel and every number of rkl_kernels/triton/tiles.py; sizes like those of benchmarks/shapes.py.
CALLS: dict[str, Any] = {
    "trelu bf16": lambda: _trelu(BF16),
    "trelu fp32": lambda: _trelu(F32),
    "depthwise 64ch 3x3 bf16": lambda: _depthwise(64, 56, 3, BF16),
    "depthwise 64ch 3x3 bf16 NCHW": lambda: _depthwise(64, 56, 3, BF16, nhwc=False),
    "depthwise 64ch 3x3 fp32": lambda: _depthwise(64, 56, 3, F32),
    "depthwise 728ch 3x3 bf16": lambda: _depthwise(728, 19, 3, BF16),
    "depthwise 64ch 3x3 s2 fp16": lambda: _depthwise(64, 56, 3, F16, stride=2),
    "depthwise 64ch 7x7 bf16": lambda: _depthwise(64, 56, 7, BF16),
    "depthwise 384ch 31x31 bf16": lambda: _depthwise(384, 32, 31, BF16),
    "depthwise 64ch 3x3 bf16, over 2^31": lambda: _depthwise(64, 512, 3, BF16, batch=256),
}


@contextmanager
def _pretend(arch: int, compiled: list[Any]) -> Iterator[None]:
    """Compile launches for ``arch`` instead of running them."""

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        compiled.append((kernel, kernel.warmup(*args, grid=grid, **constants)))

    modules = (launch, depthwise, trelu, window)
    patches = [mock.patch.object(module, "run", compile_only) for module in modules]
    # The cache is keyed by source and options, so a second run takes seconds.
    patches.append(mock.patch.object(triton.knobs.cache, "dir", str(ROOT / "build/triton")))
    patches.append(mock.patch.object(driver, "_active", _Driver(arch)))
    try:
        for patch in patches:
            patch.start()
        yield
    finally:
        for patch in patches:
            patch.stop()


def _tool(flags: list[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _row(arch: int, binary: Any) -> dict[str, Any]:
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool(["--dump-resource-usage"], binary.asm["cubin"])))
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
    mix = collections.Counter(line.findall(_tool(["-sass"], binary.asm["cubin"])))

    def count(pattern: str) -> int:
        return sum(n for name, n in mix.items() if re.match(pattern, name))

    threads, registers, shared = 32 * binary.metadata.num_warps, int(used["REG"]), binary.metadata.shared
    return {
        "arch": arch,
        "threads": threads,
        "registers": registers,
        "spills": count(r"LDL|STL") + int(used["LOCAL"]),
        "shared": shared,
        "blocks": blocks_per_multiprocessor(arch, threads, registers, shared),
        "loads_128": count(r"LDG\.\S*128|LDGSTS\.\S*128"),
        "loads": count(r"LDG(\.|STS)"),
        "stores_128": count(r"STG\.\S*128"),
    }


def _cached_row(arch: int, binary: Any) -> dict[str, Any]:
    """:func:`_row`, cached in a file named by the kernel's hash, since disassembling is the slow part."""
    path = ROOT / "build/triton_rows" / f"{binary.hash}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_row(arch, binary)))
        partial.replace(path)
    return json.loads(path.read_text())


def triton_rows(calls: Iterable[str] = tuple(CALLS)) -> list[dict[str, Any]]:
    """One row for each kernel of the named calls and each architecture, like those of static_report.nvcc_rows."""
    rows = []
    for arch in LIMITS:
        for name in calls:
            compiled: list[Any] = []
            with _pretend(arch, compiled):
                CALLS[name]()
            done: collections.Counter[str] = collections.Counter()
            for kernel, binary in compiled:
                title = f"{kernel.fn.__name__.strip('_')}, {name}"
                done[title] += 1
                if done[title] > 1:  # the gather runs again for the data gradient
                    title += f", launch {done[title]}"
                rows.append({"kernel": title, **_cached_row(arch, binary)})
    return rows
