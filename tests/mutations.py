"""Damage to files, drawn by seed, and a watch on what reading such files does."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect")
"""Audit events that Python raises before it starts a program or connects to another machine."""
MOST = 2**28
"""Bytes of memory that reading a bad file may take. The files here have some thousands."""
_started: list[str] = []
sys.addaudithook(lambda event, arguments: _started.append(f"{event} {arguments}") if event in STARTS else None)


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def flipped(content: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def headless(content: bytes, draw: random.Random) -> bytes:
    """Replace the first bytes, where a format says what it is and how large."""
    return draw.randbytes(8) + content[8:]


def spliced(content: bytes, draw: random.Random) -> bytes:
    """A part is missing, or a part is there twice."""
    start, end = sorted(draw.randrange(len(content)) for _ in range(2))
    return draw.choice((content[:start] + content[end + 1 :], content[:end] + content[start:]))


Mutation = Callable[[bytes, random.Random], bytes]


def mutated(content: bytes, counts: dict[Mutation, int]) -> Iterator[tuple[str, bytes]]:
    """As many of each kind of damage as ``counts`` says, each with a name that says how to make it again."""
    for kind, count in counts.items():
        for seed in range(count):
            damaged = kind(content, random.Random(f"{kind.__name__} {seed}"))
            if damaged != content:
                yield f"{kind.__name__} {seed}", damaged


def snapshot(folder: Path) -> dict[str, str]:
    """The content of every file below a folder, as a hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


CLEARS = Path("/proc/self/clear_refs")
"""Linux's file for it. Some containers forbid to write it."""


def clear_peak() -> str | None:
    """Make the peak of this process's memory what it holds now. Returns why that cannot be done, or None."""
    try:
        CLEARS.write_text("5")
    except OSError as problem:
        return f"the peak of this process's memory cannot be cleared: {CLEARS}: {problem.strerror}"
    return None


def most_held() -> int:
    """The most bytes of memory that this process has held since its peak was last cleared."""
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(peak.split()[1])


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """The block must start nothing, write nothing below ``folder`` and take at most ``MOST`` bytes more memory.

    Where the peak cannot be cleared, memory below what earlier tests held is not seen. The watch's own test is skipped
    there, and says why.
    """
    before = snapshot(folder)
    clear_peak()
    held = most_held()
    _started.clear()
    yield
    grown = most_held() - held
    assert not _started
    assert snapshot(folder) == before
    assert grown <= MOST, f"{grown:,} bytes more were held"


def refusals(
    file: Path, cases: Iterable[tuple[str, bytes]], read: Callable[[], object], accepts: Callable[[object], bool]
) -> int:
    """Give ``file`` each content in turn and return how many were refused.

    ``read`` must raise a ValueError of one line that names the file or its folder, or return what ``accepts`` accepts.
    """
    whole, refused = file.read_bytes() if file.exists() else None, 0
    for name, content in cases:
        file.write_bytes(content)
        with watched(file.parent):
            try:
                found = read()
            except ValueError as error:
                line = str(error)
                assert "\n" not in line, (name, line)
                assert str(file.parent) in line, (name, line)
                assert len(line) < 1000, (name, line)
                refused += 1
                continue
        assert accepts(found), f"{file.name}: {name} was taken for sound"
    if whole is not None:
        file.write_bytes(whole)
    return refused


def never(found: object) -> bool:
    return False
