"""Counts the instructions in the hot loops of the CUDA kernels: for a row of 256 outputs, or for multiply-adds.

A kernel of the row pipeline issues instructions for half of its time or more. So each instruction beside the products
costs about its share. In kernels without tensor cores, so does each instruction beside the multiply-adds. No GPU is
needed: the loops are found in the machine code that ``cuobjdump -sass`` prints.
"""

from __future__ import annotations

import collections
import functools
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")


class Instruction(NamedTuple):
    address: int
    predicate: str  # "" where it always executes
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """The address that a branch goes to. None where the code does not say."""
        found = re.search(r"0x([0-9a-f]+)\)?$", self.operands)
        return int(found[1], 16) if found else None


def functions(sass: str) -> dict[tuple[str, int], list[Instruction]]:
    """Each function's instructions, by (symbol, architecture)."""
    found: dict[tuple[str, int], list[Instruction]] = {}
    arch, body = 0, []
    for line in sass.splitlines():
        if match := _LINE.match(line):
            body.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
        elif match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function : (\S+)", line):
            body = found[match[1], arch] = []
    return found


# What an instruction is for, by its opcode. The first pattern that fits counts.
KINDS = {
    "mma_k16": r"HMMA\.16816",
    "mma_k8": r"HMMA|IMMA",
    "ldmatrix": r"LDSM",
    "shared": r"LDS|STS|ATOMS",
    "copies": r"LDGSTS|LDGDEPBAR|DEPBAR|ARRIVES|UBLKCP|UTMA",
    "global": r"LDG|STG|LD\b|ST\b|LDC|ULDC|RED|ATOM",
    "local": r"LDL|STL",
    "moves": r"U?MOV|IMAD\.MOV|R2UR|S2U?R|CS2R|PRMT|SHFL|UPRMT",
    "predicates": r"U?ISETP|FSETP|U?PLOP3|P2R|R2P|U?SEL|FSEL|VOTE",
    "addresses": r"U?IADD|U?IMAD|U?LEA|U?LOP|U?SHF|VIADD|IMNMX|VIMNMX|U?IABS|UFLO|I2F|F2I|UBMSK|BMSK|SGXT|USGXT",
    "conversions": r"F2FP|F2F|HADD2\.F32",
    "multiply_adds": r"FFMA",
    "arithmetic": r"F|MUFU|HADD2|HMUL2|HFMA2|D",
    "control": r"BRA|BSSY|BSYNC|BAR|WARPSYNC|NOP|BREAK|YIELD|CALL|RET|EXIT|JMP|BRX|MEMBAR|ERRBAR|CCTL|NANOSLEEP",
}
_LDGSTS = re.compile(KINDS["copies"])


def kind(opcode: str) -> str:
    if _LDGSTS.match(opcode):  # first, since LDGSTS begins like LDG
        return "copies"
    return next((name for name, pattern in KINDS.items() if re.match(pattern, opcode)), "other")


def _targets(body: Sequence[Instruction]) -> dict[int, list[int]]:
    """For the index of each instruction that ends a straight run, the indices where execution may go on."""
    at = {instruction.address: i for i, instruction in enumerate(body)}
    meets: dict[str, int] = {}  # by BSSY's barrier register, where the threads meet again
    goes: dict[int, list[int]] = {}
    for i, one in enumerate(body):
        name = one.opcode.split(".")[0]
        after = [i + 1] if i + 1 < len(body) else []
        if name == "BSSY" and one.target is not None:
            meets[one.operands.split(",")[0]] = one.target
        elif name == "BSYNC":
            to = meets.get(one.operands.strip())
            goes[i] = ([at[to]] if to in at else []) + (after if one.predicate else [])
        elif one.opcode.startswith("BRA.DIV"):
            goes[i] = after  # the path of a warp whose threads have diverged: not followed
        elif name in ("BRA", "JMP"):
            conditional = one.predicate or re.match(r"!?U?P\d", one.operands)
            goes[i] = ([at[one.target]] if one.target in at else []) + (after if conditional else [])
        elif name in ("EXIT", "RET", "BRX"):
            goes[i] = after if one.predicate else []
    return goes


def _blocks(body: Sequence[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Straight runs of instructions, and the runs that may follow each."""
    goes = _targets(body)
    starts = sorted({0, *(i + 1 for i in goes if i + 1 < len(body)), *(t for ts in goes.values() for t in ts)})
    runs = [range(a, b) for a, b in zip(starts, [*starts[1:], len(body)], strict=True)]
    number = {run.start: n for n, run in enumerate(runs)}
    follow = []
    for run in runs:
        next_ones = goes.get(run[-1], [run.stop] if run.stop < len(body) else [])
        follow.append([number[i] for i in next_ones])
    return runs, follow


def _before(follow: list[list[int]]) -> list[list[int]]:
    """For each run, those that it may follow."""
    before: list[list[int]] = [[] for _ in follow]
    for n, next_ones in enumerate(follow):
        for m in next_ones:
            before[m].append(n)
    return before


def _dominators(before: list[list[int]]) -> list[int]:
    """For each run, its dominators: the runs on every path to it from the start. Bit m stands for run m, and there is
    none where no path leads to the run."""
    found = [1] + [0] * (len(before) - 1)
    changed = True
    while changed:
        changed = False
        for n in range(1, len(before)):
            reached = [found[m] for m in before[n] if found[m]]
            now = functools.reduce(operator.and_, reached) | 1 << n if reached else 0
            if now != found[n]:
                found[n], changed = now, True
    return found


def loops(body: Sequence[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that multiply matrices, or numbers where the code has no matrix products. Each comes with all
    of its instructions, those on unlikely paths included."""
    if not body:
        return []
    runs, follow = _blocks(body)
    before = _before(follow)
    dominators = _dominators(before)
    inside: dict[int, set[int]] = {}  # by a loop's first run, all of its runs
    for n, next_ones in enumerate(follow):
        for head in next_ones:
            if not dominators[n] >> head & 1:
                continue
            members, waiting = inside.setdefault(head, {head}), [n]
            while waiting:
                if (m := waiting.pop()) not in members:
                    members.add(m)
                    waiting += [p for p in before[m] if dominators[p]]

    opcode = "HMMA" if any(one.opcode.startswith("HMMA") for one in body) else "FFMA"

    def multiplies(members: Iterable[int]) -> bool:
        return any(body[i].opcode.startswith(opcode) for m in members for i in runs[m])

    multiplying = [members for members in inside.values() if multiplies(members)]
    innermost = [one for one in multiplying if not any(other < one for other in multiplying)]
    return [[body[i] for m in sorted(members) for i in runs[m]] for members in innermost]


def loop_rows(kernel: str, arch: int, body: Sequence[Instruction]) -> list[dict[str, Any]]:
    """A row for each loop, with the number of instructions of each kind, the loop with the most products first. For a
    kernel without products, only the loop with the most multiply-adds."""
    rows: list[dict[str, Any]] = []
    for loop in loops(body):
        kinds = collections.Counter(kind(one.opcode) for one in loop)
        counted = {name: kinds[name] for name in (*KINDS, "other")}
        rows.append({"kernel": kernel, "arch": arch, "instructions": len(loop), **counted})
    rows.sort(key=lambda row: -multiplications(row))
    return rows if rows and products_of(rows[0]) else rows[:1]


def products_of(loop: dict[str, Any]) -> int:
    """The number of a loop's matrix products."""
    return int(loop["mma_k16"] + loop["mma_k8"])


def multiplications(loop: dict[str, Any]) -> int:
    """The number of a loop's matrix products or, if it has none, of its multiply-adds."""
    return products_of(loop) or int(loop["multiply_adds"])


@dataclass(frozen=True)
class Bound:
    """What the hot loop, the one with the most products, may cost in the kernels with such a name.

    A row is 256 outputs: 32 pixels by 8 channels.

    Attributes:
        kernel: a regular expression for the whole name.
        products: the mma instructions for a row, which tell how many rows the loop makes. For a kernel without mma, a
            number of multiply-adds.
        instructions: the most instructions of all kinds for a row, or for so many multiply-adds.
        blocks: how many blocks must fit on a multiprocessor, by their registers.
        arch: the architecture, such as 90.
    """

    kernel: str
    products: int
    instructions: float
    blocks: int = 1
    arch: int = 90


def instructions_a_row(loop: dict[str, Any], products: int) -> float:
    return loop["instructions"] * products / multiplications(loop)


def beyond(bounds: Iterable[Bound], rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """What is worse than its bound, one line each.

    Args:
        rows: the kernels, from static_report.nvcc_rows.
        found: their loops, from static_report.nvcc_loops.
    """
    wrong = []
    for bound in bounds:
        kernels = [row for row in rows if row["arch"] == bound.arch and re.fullmatch(bound.kernel, row["kernel"])]
        if not kernels:
            wrong.append(f"{bound.kernel} on sm_{bound.arch}: no such kernel")
        for row in kernels:
            where = f"{row['kernel']} on sm_{row['arch']}"
            hot = next((one for one in found if (one["kernel"], one["arch"]) == (row["kernel"], row["arch"])), None)
            if hot is None:
                wrong.append(f"{where}: no loop multiplies matrices or numbers")
            elif (count := instructions_a_row(hot, bound.products)) > bound.instructions:
                unit = "a row of 256 outputs" if products_of(hot) else f"for {bound.products} multiply-adds"
                wrong.append(f"{where}: {count:.1f} instructions {unit}, at most {bound.instructions}")
            if row["blocks"] < bound.blocks:
                wrong.append(f"{where}: {row['blocks']} blocks fit on a multiprocessor, at least {bound.blocks} must")
    return wrong
