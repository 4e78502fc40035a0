"""What the compilers made of the GPU kernels: registers, spills, shared memory, occupancy, instructions. No GPU needed.

``make static`` writes benchmarks/results/static.json and static.md. A test compares later builds with the committed
JSON. These figures guard against regressions. They are no claims of speed.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

from rkl.training.files import UnwritableError, check_writable, write_text

from .static_loops import Instruction, functions, loop_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
LIBRARY = ROOT / "rkl_kernels/_C_cuda.abi3.so"
# Per multiprocessor: registers, warps, blocks, shared memory; the largest shared memory of a block.
LIMITS = {80: (65536, 64, 32, 164 << 10, 163 << 10), 90: (65536, 64, 32, 228 << 10, 227 << 10)}
RESERVED_SHARED = 1024  # bytes that the system reserves in each block
Bodies = dict[tuple[str, int], list[Instruction]]
"""Kernels' instructions, by (symbol, architecture)."""
Loops = dict[tuple[str, int], list[dict[str, Any]]]
"""Their hot loops, as rows of static_loops.loop_rows."""


def tool(name: str) -> Path | None:
    """A program of the CUDA toolkit that the triton package ships. None where there is none."""
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return path if path.exists() else None


def blocks_per_multiprocessor(arch: int, threads: int, registers: int, shared: int) -> int:
    """How many blocks fit at once. Registers go to warps in units of 256, and warps to the four schedulers in turn."""
    all_registers, all_warps, all_blocks, all_shared, block_shared = LIMITS[arch]
    if shared > block_shared:
        return 0
    warps = -(-threads // 32)
    warps_by_registers = all_registers // (-(-max(registers, 1) * 32 // 256) * 256) // 4 * 4
    by_shared = all_shared // (-(-shared // 128) * 128 + RESERVED_SHARED)
    return min(all_blocks, all_warps // warps, warps_by_registers // warps, by_shared)


def _cuobjdump(*flags: str) -> str:
    command = [str(tool("cuobjdump")), *flags, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def built_kernels() -> Bodies:
    return functions(_cuobjdump("-sass"))


def _demangled(names: list[str]) -> dict[str, str]:
    """Short readable names by symbol, without namespaces and parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    short = (
        re.sub(r"\(anonymous namespace\)::|rkl::cuda::|^void |\(int\)|\(bool\)|__nv_", "", line)
        for line in done.stdout.splitlines()
    )
    return dict(zip(names, (re.sub(r"\([^()]*\)$", "", name).replace("__half", "half") for name in short), strict=True))


def _resources() -> dict[tuple[str, int], dict[str, int]]:
    found, arch, name = {}, 0, ""
    for line in _cuobjdump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found[name, arch] = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    return found


def nvcc_rows(bodies: Bodies, loops: Loops) -> list[dict[str, Any]]:
    """One row for each kernel and architecture of the built CUDA extension.

    ``blocks`` is how many blocks of the largest allowed size fit on a multiprocessor, by their registers and static
    shared memory. Dynamic shared memory is decided at the launch, where the emulator checks it against its limit.
    """
    resources = _resources()
    mix = {key: collections.Counter(one.opcode for one in body) for key, body in bodies.items()}
    # The launch bounds are in the PTX.
    ptx = re.findall(r"\.entry (\w+)\(.*?\)\s*\.maxntid (\d+)", _cuobjdump("-ptx"), re.DOTALL)
    threads = {name: int(n) for name, n in ptx}
    names = _demangled(sorted({name for name, _ in resources}))
    rows = []
    for (name, arch), used in sorted(resources.items(), key=lambda item: (names[item[0][0]], item[0][1])):
        # From sm_90 on, the count includes what the system reserves.
        shared = used["SHARED"] - (RESERVED_SHARED if arch >= 90 and used["SHARED"] >= RESERVED_SHARED else 0)

        def count(pattern: str, key: tuple[str, int] = (name, arch)) -> int:
            return sum(n for op, n in mix[key].items() if re.match(pattern, op))

        rows.append(
            {
                "kernel": names[name],
                "arch": arch,
                "threads": threads.get(name, 1024),
                "registers": used["REG"],
                "spills": sum(row["local"] for row in loops[name, arch]) if count("HMMA") else count("LDL|STL"),
                "shared": shared,
                "blocks": blocks_per_multiprocessor(arch, threads.get(name, 1024), used["REG"], shared),
                "loads_128": count(r"LDG\.\S*128|LDGSTS\.\S*128"),
                "loads": count(r"LDG(\.|STS)"),
                "stores_128": count(r"STG\.\S*128"),
                "hmma": count("HMMA"),
                "instructions": sum(mix[name, arch].values()),
            }
        )
    return rows


def nvcc_loops(bodies: Bodies) -> Loops:
    """The hot loops of these kernels, in the order of their readable names."""
    names = _demangled(sorted({name for name, _ in bodies}))
    ordered = sorted(bodies.items(), key=lambda item: (names[item[0][0]], item[0][1]))
    return {(name, arch): loop_rows(names[name], arch, body) for (name, arch), body in ordered}


def triton_rows() -> list[dict[str, Any]]:
    """The same for the Triton kernels, compiled ahead of time by benchmarks/static_triton.py."""
    from .static_triton import triton_rows

    return triton_rows()


WANTED = {"loads_128": "128-bit loads", "stores_128": "128-bit stores", "hmma": "HMMA"}
"""Instructions that a kernel must not lose if it had them."""


def regressions(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a build, by itself and against an earlier one. New kernels are only judged by themselves."""
    found = []
    earlier = {(row["kernel"], row["arch"]): row for row in before}
    for row in now:
        where = f"{row['kernel']} on sm_{row['arch']}"
        if row["spills"]:
            found.append(f"{where}: {row['spills']} accesses of local memory, must be none")
        if not row["blocks"]:
            found.append(f"{where}: no block of {row['threads']} threads fits on a multiprocessor")
        old = earlier.get((row["kernel"], row["arch"]))
        if old is None:
            continue
        if row["blocks"] * row["threads"] < old["blocks"] * old["threads"]:
            found.append(f"{where}: {row['registers']} registers, {row['blocks']} blocks fit, were {old['blocks']}")
        for field, what in WANTED.items():
            if old.get(field) and not row[field]:
                found.append(f"{where}: no {what} any more, were {old[field]}")
    return found


def markdown(report: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "# What the compilers made of the GPU kernels",
        "",
        "Written by `make static`. Spills must be 0: accesses of local memory, of kernels that multiply matrices those",
        "in the loops that do so (beside them a few bytes may be spilled, once a task). Blocks: how many fit on a",
        "multiprocessor by registers and static shared memory. Counts of instructions in the code, not of those run.",
        "Loops: of a kernel that multiplies matrices, every innermost loop that does so, the one with the most",
        "products first. Of another kernel, the innermost loop with the most multiply-adds. A kernel without either",
        "has no line.",
    ]
    for compiler, rows in report.items():
        fields = list(rows[0]) if rows else []
        lines += ["", f"## {compiler}", "", "| " + " | ".join(fields) + " |", "|" + "---|" * len(fields)]
        lines += ["| " + " | ".join(str(row[field]) for field in fields) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_report", description=__doc__)
    parser.parse_args()
    if not LIBRARY.exists() or not tool("cuobjdump"):
        raise SystemExit(
            f"the report needs {LIBRARY.name} and triton's cuobjdump; run `make build` with the extra [cuda]"
        )
    try:
        check_writable(RESULTS / "static.json", RESULTS / "static.md")
    except UnwritableError as problem:
        raise SystemExit(str(problem)) from None
    bodies = built_kernels()
    loops = nvcc_loops(bodies)
    report = {
        "nvcc": nvcc_rows(bodies, loops),
        "loops": [*chain.from_iterable(loops.values())],
        "triton": triton_rows(),
    }
    # One row a line, so that a diff shows the rows that changed.
    tables = (f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in report.items())
    write_text(RESULTS / "static.json", "{" + ",\n".join(tables) + "}\n")
    write_text(RESULTS / "static.md", markdown(report))
    print(f"{sum(map(len, report.values()))} rows in {RESULTS / 'static.md'}")


if __name__ == "__main__":
    main()
