"""Rewrites the three pieces of CUDA that a C++ compiler cannot read. All else stays, line numbers too."""

from __future__ import annotations

import re

_ALIGN = r"(?:(?:__align__|alignas)\(\s*\w+\s*\)\s*)?"
_TYPE = r"((?:unsigned\s+)?[\w:]+(?:<[^;=]*?>)?)"
_DYNAMIC = re.compile(rf"extern\s+__shared__\s+{_ALIGN}{_TYPE}\s+{_ALIGN}(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(rf"(?:static\s+)?__shared__\s+{_ALIGN}{_TYPE}\s+{_ALIGN}(\w+)((?:\s*\[[^\]]+\])*)\s*;")
_LAUNCH = re.compile(r"([\w:.]+)((?:<[^;{}]*?>)?)\s*<<<(.*?)>>>\s*\((?=\s*(\))?)", re.DOTALL)


def rewrite(source: str, path: str) -> str:
    """Rewrite CUDA text as C++ text.

    - ``extern __shared__ T name[];`` becomes a pointer to the launch's dynamic shared memory.
    - ``__shared__ T name[n];`` becomes a reference to an object of the block.
    - ``kernel<T><<<grid, block, bytes, stream>>>(a, b)`` becomes a call of ``emulator::Launch``.
    """
    source = _DYNAMIC.sub(r"\1* \2 = static_cast<\1*>(emulator::dynamic_shared_memory());", source)
    source = _STATIC.sub(r"auto& \2 = emulator::shared<\1\3>([] {});", source)
    source = _LAUNCH.sub(
        lambda m: f'emulator::Launch("{m[1]}", {m[3]})({m[1]}{m[2]}{"" if m[4] else ", "}',
        source,
    )
    return f'#include "emulator.h"\n#line 1 "{path}"\n{source}'
