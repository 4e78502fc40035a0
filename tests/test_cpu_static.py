"""The machine code of the CPU's hot loops: sliding sums must stay in registers."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from functools import cache

import pytest

pytestmark = [  # the loops below are found by their instructions
    pytest.mark.xdist_group("cpu_static"),  # one worker, so that the machine code is listed once
    pytest.mark.skipif(platform.machine() != "x86_64", reason=f"names x86-64's loops; this is {platform.machine()}"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="reads machine code by objdump; it is not on PATH"),
]

# Namespace, and class with its arguments: taps, step, rows of outputs or of the filter, vectors. The last argument of
# a Window is the filter's height.
LOOPS = [
    ("avx512", "Window<float, 3, 1, 2, 1, 3>", 54),  # multiply-adds: 3 columns x 2 rows x 9 taps
    ("avx512", "Window<float, 3, 2, 2, 1, 3>", 36),
    ("avx512", "Window<float, 2, 1, 2, 1, 2>", 16),
    ("avx512", "Window<float, 1, 1, 2, 1, 3>", 6),
    ("avx512", "FilterWindow<float, 3, 1, 3, 1>", 27),
    ("avx512_bf16", "Window<c10::BFloat16, 3, 1, 2, 1, 3>", 36),  # one instruction takes two rows of the filter
    # Not <..., 3, 1, 2, 2, 3>: with 24 sums and weights GCC 12 runs out of registers and keeps 11 vectors on the stack.
    ("avx512_bf16", "Window<c10::BFloat16, 3, 2, 2, 2, 3>", 48),
    ("avx512_bf16", "Window<c10::BFloat16, 2, 1, 2, 2, 2>", 16),
    ("avx512_bf16", "Window<c10::BFloat16, 1, 1, 2, 2, 3>", 8),
    ("avx512_bf16", "FilterWindow<c10::BFloat16, 3, 1, 3, 2>", 54),
    # Not <..., 3, 1, 2, 2, 3>: 12 sums and two pixels leave 2 of 16 registers, so 44 vectors are on the stack.
    ("avx2", "Window<float, 3, 1, 2, 1, 3>", 54),
    ("avx2", "Window<float, 3, 2, 2, 2, 3>", 72),
    ("avx2", "Window<float, 2, 1, 2, 2, 2>", 32),
    ("avx2", "Window<float, 1, 1, 2, 2, 3>", 12),
    ("avx2", "FilterWindow<float, 3, 1, 3, 1>", 27),
]


# Each loop as it runs where images lie near. In fp32 with AVX-512 each also as it prefetches into the nearest cache.
EVERY_LOOP = [(*loop, False) for loop in LOOPS] + [(*loop, True) for loop in LOOPS if loop[0] == "avx512"]


@cache
def functions() -> dict[str, list[tuple[int, str]]]:
    """The instructions of each function, with their addresses."""
    extension = importlib.util.find_spec("rkl_kernels._C")
    assert extension is not None
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(extension.origin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    for line in listing.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            instructions = found.setdefault(head[1], [])
        elif (instruction := re.match(r"\s+([0-9a-f]+):\s+(.*)", line)) and found:
            instructions.append((int(instruction[1], 16), instruction[2]))
    return found


def products_of(loop: list[str]) -> int:
    return sum(text.startswith(("vfmadd", "vdpbf16ps")) for text in loop)


def loops_of(isa: str, name: str) -> list[list[str]]:
    instructions = next(body for f, body in functions().items() if f"::{isa}::{name}::run(" in f)
    jumps = [(at, int(jump[1], 16)) for at, text in instructions if (jump := re.match(r"j\w+\s+([0-9a-f]+)", text))]
    return [[text for at, text in instructions if to <= at <= end] for end, to in jumps if to < end]


def hot_loop(isa: str, name: str, products: int, looks_ahead: bool) -> list[str]:
    """The instructions of the function's shortest loop with that many multiply-adds.

    ``looks_ahead`` chooses a loop that prefetches pixels into the nearest cache, or one that does not.
    """
    loops = loops_of(isa, name)
    alike = [
        loop
        for loop in loops
        if products_of(loop) == products and any("prefetcht0" in text for text in loop) == looks_ahead
    ]
    assert alike, sorted(map(products_of, loops))
    if isa != "avx512":  # there two hot loops overlap, and a jump back over both of them spans more products
        assert products == max(map(products_of, loops))
    return min(alike, key=len)


def test_what_instruction_sets_share_is_compiled_for_every_processor() -> None:
    """The linker keeps one copy of an inline function that several instruction sets use. It must use none of them."""
    own = re.compile(r"::(avx2|avx512|avx512_bf16)::")
    assert any(own.search(name) for name in functions())
    wide = re.compile(r"%[yz]mm|%k[1-7]|^v[a-z]")
    assert not [f for f, body in functions().items() if not own.search(f) and any(wide.search(t) for _, t in body)]


@pytest.mark.parametrize(("isa", "name", "products", "looks_ahead"), EVERY_LOOP)
def test_sums_and_weights_stay_in_registers(isa: str, name: str, products: int, looks_ahead: bool) -> None:
    loop = hot_loop(isa, name, products, looks_ahead)
    spilled = [text for text in loop if re.search("[yz]mm", text) and re.search(r"\(%r[sb]p", text)]
    assert not spilled


@pytest.mark.parametrize("taps", [4, 5, 6, 7])
@pytest.mark.parametrize("outputs", [4, 7, 8])
def test_sums_of_a_block_stay_in_registers(taps: int, outputs: int) -> None:
    """The sums and weights of two vectors and two pixels take up to 32 registers. A row's loop must reload none."""
    loops = loops_of("avx512", f"Block<float, {taps}, 1, {outputs}, 2>")
    row = min((loop for loop in loops if products_of(loop) == taps * outputs * 2), key=len)
    assert not [text for text in row if re.search(r"\(%r[sb]p[^)]*\).*zmm", text)]
