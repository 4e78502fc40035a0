"""Damage to files, drawn by seed; and a watch on what reading them does."""

from __future__ import annotations

import hashlib
import random
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect")
"""What Python announces before it starts a program or talks to another machine."""
MOST = 2**28
"""Bytes that reading a bad file may hold; a file here has some thousands."""
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
    """The first bytes, where a format says what it is and how large, are others."""
    return draw.randbytes(8) + content[8:]


def spliced(content: bytes, draw: random.Random) -> bytes:
    """A part is missing, another is there twice."""
    start, end = sorted(draw.randrange(len(content)) for _ in range(2))
    return draw.choice((content[:start] + content[end + 1 :], content[:end] + content[start:]))


Mutation = Callable[[bytes, random.Random], bytes]


def mutated(content: bytes, counts: dict[Mutation, int]) -> Iterator[tuple[str, bytes]]:
    """So many of each kind of damage, with a name that says how to make it again."""
    for kind, count in counts.items():
        for seed in range(count):
            damaged = kind(content, random.Random(f"{kind.__name__} {seed}"))
            if damaged != content:
                yield f"{kind.__name__} {seed}", damaged


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Hold the block to this: nothing started, nothing written below ``folder``, at most so much more held."""
    before, held = snapshot(folder), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _started.clear()
    yield
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held)
    assert not _started
    assert snapshot(folder) == before
    assert grown <= MOST, f"{grown:,} bytes more were held"


def refusals(
    file: Path, cases: Iterable[tuple[str, bytes]], read: Callable[[], object], accepts: Callable[[object], bool]
) -> int:
    """Give ``file`` each content in turn. ``read`` must name it, or one of the folder, in the one line of a ValueError,
    or give what ``accepts`` takes. How many were refused."""
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
