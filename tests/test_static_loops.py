"""How hot loops are found in machine code, and the bounds on their instructions."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.static_loops import Bound, beyond, functions, instructions_a_row, kind, loop_rows

# An outer loop from 0x0010 around one from 0x0020 that multiplies. The unlikely part of the inner loop stands behind it
# and jumps back. The shuffle has a branch for a warp whose threads have diverged, which a whole warp never takes.
OUTER = """
\tarch = sm_90
\t\tFunction : _Z4loopv
        /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x00000a0000017a02 */
                                                                   /* 0x000fe40000000f00 */
        /*0010*/                   IMAD.MOV.U32 R2, RZ, RZ, RZ ;
        /*0020*/                   LDSM.16.M88.4 R4, [R3] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R12, R8 ;
        /*0040*/                   HMMA.1688.F32.BF16 R8, R4, R12, R8 ;
        /*0050*/              @!P1 BRA 0xd0 ;
        /*0060*/                   BRA.DIV UR4, 0xf0 ;
        /*0070*/                   SHFL.IDX PT, R5, R5, RZ, 0x1f ;
        /*0080*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0090*/                   ISETP.GE.AND P0, PT, R2, R6, PT ;
        /*00a0*/              @!P0 BRA 0x20 ;
        /*00b0*/               @P2 BRA 0x10 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   STG.E.128 desc[UR4][R10.64], R8 ;
        /*00e0*/                   BRA 0x60 ;
        /*00f0*/                   WARPSYNC.COLLECTIVE R7, 0x100 ;
        /*0100*/                   BRA 0x80 ;
        /*0110*/                   BRA 0x110 ;
"""
# Threads that diverge and meet again (BSSY, BSYNC) inside the loop.
MEETING = """
\tarch = sm_80
\t\tFunction : _Z4meetv
        /*0000*/                   BSSY B0, 0x50 ;
        /*0010*/               @P0 BRA 0x40 ;
        /*0020*/                   HMMA.16816.F32 R8, R4, R12, R8 ;
        /*0030*/                   BSYNC B0 ;
        /*0040*/                   BSYNC B0 ;
        /*0050*/               @P1 BRA 0x0 ;
        /*0060*/                   EXIT ;
"""


def test_innermost_loop_with_what_jumps_back_into_it() -> None:
    ((key, body),) = functions(OUTER).items()
    assert key == ("_Z4loopv", 90)
    assert len(body) == 18
    (row,) = loop_rows("loop", 90, body)
    assert {name: value for name, value in row.items() if value} == {
        "kernel": "loop", "arch": 90, "instructions": 11, "mma_k16": 1, "mma_k8": 1, "ldmatrix": 1, "global": 1,
        "moves": 1, "predicates": 1, "addresses": 1, "control": 4,
    }  # fmt: skip


def test_threads_that_meet_again() -> None:
    (body,) = functions(MEETING).values()
    (row,) = loop_rows("meet", 80, body)
    assert row["instructions"] == 6


def test_a_loop_that_multiplies_numbers() -> None:
    (body,) = functions(MEETING.replace("HMMA.16816.F32", "FFMA")).values()
    (row,) = loop_rows("numbers", 80, body)
    assert (row["multiply_adds"], row["instructions"]) == (1, 6)


def test_code_without_a_loop() -> None:
    (body,) = functions(OUTER.replace("@!P0 BRA 0x20", "NOP").replace("@P2 BRA 0x10", "NOP")).values()
    assert loop_rows("loop", 90, body) == []
    assert loop_rows("none", 90, []) == []


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("LDGSTS.E.BYPASS.LTC128B.128", "copies"), ("LDG.E.128", "global"), ("STL", "local"),
        ("IMAD.MOV.U32", "moves"), ("IMAD.SHL.U32", "addresses"), ("FSETP.GT.AND", "predicates"),
        ("FADD", "arithmetic"), ("FFMA", "multiply_adds"), ("F2FP.BF16.F32.PACK_AB", "conversions"),
        ("STSM.16.M88.4", "shared"), ("DEPBAR.LE", "copies"), ("MUFU.TANH", "arithmetic"), ("UIADD3", "addresses"),
        ("UNKNOWN", "other"),
    ],
)  # fmt: skip
def test_kinds(opcode: str, expected: str) -> None:
    assert kind(opcode) == expected


ROW: dict[str, Any] = {"kernel": "conv<3>", "arch": 90, "blocks": 8}
LOOP: dict[str, Any] = {"kernel": "conv<3>", "arch": 90, "instructions": 168, "mma_k16": 12, "mma_k8": 12}
NUMBERS = LOOP | {"mma_k16": 0, "mma_k8": 0, "multiply_adds": 112}


def test_a_loop_of_two_rows_counts_half_for_each() -> None:
    assert instructions_a_row(LOOP, products=12) == 84
    assert beyond([Bound(r"conv<\d>", products=12, instructions=84, blocks=8)], [ROW], [LOOP]) == []


@pytest.mark.parametrize(
    ("bound", "loops", "message"),
    [
        (Bound(r"conv<3>", 12, 83), [LOOP], "conv<3> on sm_90: 84.0 instructions a row of 256 outputs, at most 83"),
        (Bound(r"conv<3>", 32, 47), [NUMBERS], "conv<3> on sm_90: 48.0 instructions for 32 multiply-adds, at most 47"),
        (Bound(r"conv<3>", 12, 84, blocks=9), [LOOP], "8 blocks fit on a multiprocessor, at least 9 must"),
        (Bound(r"conv<3>", 12, 84), [], "no loop multiplies matrices or numbers"),
        (Bound(r"conv", 12, 84), [LOOP], "conv on sm_90: no such kernel"),
    ],
)
def test_what_is_beyond_its_bound_is_named(bound: Bound, loops: list[dict[str, Any]], message: str) -> None:
    (found,) = beyond([bound], [ROW], loops)
    assert message in found
