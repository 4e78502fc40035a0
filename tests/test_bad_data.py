"""Damaged and hostile images and data sets.

Each is refused in one line that names it. Nothing is run or written for it, and no large memory is held. Where a format
cannot tell a changed value from a right one (a pixel, say), the result has the format's shape.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import flipped, headless, mutated, never, refusals, spliced, truncated
from PIL import Image
from test_data_formats import write_cifar10_binaries, write_cifar10_pickles, write_fashion

from rkl.data import DataError, formats, load


def encoded(format: str) -> bytes:
    content, draw = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(content, format)
    return content.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + b"".join(chunks) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"])
def test_damaged_images_are_refused_or_are_images(tmp_path: Path, format: str) -> None:
    file, content = tmp_path / "a.png", encoded(format)
    shaped = lambda image: image.shape == (3, 16, 16) and image.dtype == torch.uint8  # noqa: E731
    read = lambda: formats.image_tensor(file, 16)  # noqa: E731
    refusals(file, mutated(content, {flipped: 8, spliced: 4}), read, shaped)
    heads = [*mutated(content, {headless: 2})]
    assert refusals(file, heads, read, never) == len(heads)
    short = [(f"the first {count} bytes", content[:count]) for count in (0, 4, 11, len(content) // 3)]
    assert refusals(file, short, read, never) == len(short)


def test_hostile_images_are_refused(tmp_path: Path) -> None:
    file, marker = tmp_path / "a.png", tmp_path / "ran"
    script = (
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch {marker}) (w) file\nshowpage\n"
    )
    tiff = struct.pack("<2sHIH", b"II", 42, 8, 2) + b"".join(
        struct.pack("<HHII", tag, 4, 1, 2**31 - 1) for tag in (256, 257)
    )
    cases = [
        ("EPS, for which Pillow runs Ghostscript", script.encode()),
        ("SVG with an entity", b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'),
        ("PNG of 10^10 pixels", png(10**5, 10**5)),
        ("PNG of 2^62 pixels", png(2**31 - 1, 2**31 - 1)),
        ("PNG with a text of 100 MB", png(10**5, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8))))),
        ("PNG with a profile of 100 MB", png(10**5, 9, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8))))),
        ("PNG of 0 pixels", png(0, 9)),
        ("PPM of 10^16 pixels", b"P6 99999999 99999999 255\n" + bytes(100)),
        ("GIF of 65,535 squared", b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(20)),
        ("BMP of 2^30 squared", encoded("BMP")[:18] + struct.pack("<ii", 2**30, 2**30) + encoded("BMP")[26:]),
        ("TIFF of 2^31 squared", tiff),
        ("a program", b"\x7fELF" + bytes(100)),
        ("a pickle", pickle.dumps({"a": 1})),
    ]
    assert refusals(file, cases, lambda: formats.image_tensor(file, 16), never) == len(cases)
    assert not marker.exists()


def test_bad_idx_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion(tmp_path)
    read = lambda: load("fashion-mnist", tmp_path)  # noqa: E731
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    cases = [*mutated(whole, {truncated: 4, headless: 2, flipped: 8})]
    for shape in ((2**32 - 1,) * 3, (2**31, 2**31, 4), (40, 0, 28), (40, 28, 29), (0, 0, 0)):
        cases.append((str(shape), gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, *shape) + bytes(31360))))
    monkeypatch.setattr(formats, "MOST_UNPACKED", 2**20)
    cases.append(("a bomb", gzip.compress(bytes(2**24))))
    # gzip's checksum detects every flip except those in the name and date of its header.
    assert refusals(file, cases, read, lambda data: len(data.train) == 36) >= len(cases) - 1
    file.write_bytes(cases[-1][1])
    with pytest.raises(DataError, match=r"must unpack to at most 1,048,576 bytes, got more"):
        read()


class Runs:
    """Pickles as a call of ``function``, which unpickling would run."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def test_bad_cifar_files_are_refused(tmp_path: Path) -> None:
    write_cifar10_pickles(tmp_path)
    folder, marker = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py" / "ran"
    file = folder / "data_batch_3"
    sound = {b"data": np.zeros((20, 3072), np.uint8), b"labels": [*range(10)] * 2}
    calls = [
        Runs(os.system, f"touch {marker}"),
        Runs(subprocess.Popen, ["touch", str(marker)]),
        Runs(eval, f"open({str(marker)!r}, 'w')"),
        Runs(open, str(marker), "w"),
        Runs(np.load, str(file), None, True),
        Runs(np.ndarray, (10**7, 3072), "u1"),
        Runs(np.zeros(0).__reduce__()[0], np.ndarray, (10**7, 3072), b"b"),
        Runs(bytearray, 10**10),
        Runs(torch.load, str(file)),
    ]
    wrong: list[dict[bytes, object]] = [{b"data": call} for call in calls]
    wrong += [
        {b"labels": value} for value in (["a"] * 20, [[0]] * 20, [0.5] * 20, [10**30] * 20, 3, None, {}, [[0], []])
    ]
    wrong += [{b"data": value} for value in (None, [[1], [1, 2]], np.zeros((20, 3071), np.uint8), np.zeros(20, "O"))]
    cases = [(str(change)[:60], pickle.dumps(sound | change, protocol=2)) for change in wrong]
    cases += [
        ("no dictionary", pickle.dumps([1])),
        ("a count of 2^31", b"\x80\x02\x8a\xff\xff\xff\x7f."),
        ("empty", b""),
    ]
    read = lambda: load("cifar10", tmp_path)  # noqa: E731
    assert refusals(file, cases, read, never) == len(cases)
    content = file.read_bytes()
    short = [(f"the first {count} bytes", content[:count]) for count in (0, 9, 99, len(content) // 2, len(content) - 1)]
    assert refusals(file, short, read, never) == len(short)
    refusals(file, mutated(content[:300] + content[-300:], {flipped: 12}), read, never)
    names = folder / "batches.meta"
    wrong_names = [(str(value), pickle.dumps({b"label_names": value})) for value in (3, "abc", [1] * 10, None, [b"a"])]
    assert refusals(names, wrong_names, read, never) == len(wrong_names)
    assert not marker.exists()


def test_bad_binaries_are_refused(tmp_path: Path) -> None:
    write_cifar10_binaries(tmp_path)
    folder = tmp_path / "cifar-10-batches-bin"
    read = lambda: load("cifar10", tmp_path)  # noqa: E731
    file = folder / "data_batch_2.bin"
    cases = [
        *mutated(file.read_bytes(), {truncated: 4, spliced: 4}),
        ("labels of 255", b"\xff" * 61460),
        ("empty", b""),
    ]
    assert refusals(file, cases, read, never) == len(cases)
    assert refusals(folder / "batches.meta.txt", [("no text", b"\xff\xfe"), ("empty", b"")], read, never) == 2
