"""Readers of the formats on disk. Their errors name the file and the rule. No reader runs code from a file."""

from __future__ import annotations

import gzip
import math
import os
import pickle
import reprlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rkl_kernels.errors import told

from .dataset import DataError, MissingDataError, Split

MOST_UNPACKED = 2**28
"""The most bytes that a packed file may unpack to: five times the largest known file."""
IMAGE_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".j2k", ".jp2", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
}


def read_bytes(path: Path) -> bytes:
    """A file's content, unpacked if its name ends in .gz."""
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            content = file.read(MOST_UNPACKED + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the data set is incomplete") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: must be a readable file, got {told(error)}") from None
    if len(content) > MOST_UNPACKED:
        raise DataError(f"{path}: must unpack to at most {MOST_UNPACKED:,} bytes, got more")
    return content


def class_names(path: Path) -> list[str]:
    """Class names: the words of a text file."""
    try:
        return read_bytes(path).decode().split()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be text in UTF-8, got {error}") from None


def checked_split(path: Path, images: np.ndarray, labels: np.ndarray, classes: int) -> Split:
    """A split of images and labels from ``path``. There must be one label for each image, each below ``classes``."""
    if len(images) != len(labels):
        raise DataError(f"{path}: must hold one label an image, got {len(labels)} labels for {len(images)} images")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        wrong = next(int(label) for label in labels if not 0 <= label < classes)
        raise DataError(f"{path}: labels must be between 0 and {classes - 1}, got {wrong}")
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))


def idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes: magic (0, 0, 8, dimensions), big-endian sizes, then the values."""
    content = read_bytes(path)
    header = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < header:
        raise DataError(f"{path}: must be IDX, bytes in {dimensions} dimensions; got a header of {content[:4].hex()!r}")
    shape = tuple(np.frombuffer(content, ">u4", dimensions, 4).tolist())
    return _records(path, content[header:], shape)


def _records(path: Path, content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes as an array of ``shape``. If its first size is -1, the file's length gives the count."""
    record = math.prod(shape[1:])
    count = len(content) // max(1, record) if shape[0] == -1 else shape[0]
    if len(content) != count * record or not count * record:
        rule = f"a multiple of {record}" if shape[0] == -1 else str(count * record)
        raise DataError(f"{path}: must hold {rule} bytes of data, got {len(content)}; the file is cut short or damaged")
    return np.frombuffer(content, np.uint8).reshape(count, *shape[1:]).copy()


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers, strings and NumPy arrays, which CIFAR's files hold. It refuses every other global."""

    _ARRAY = object()

    @classmethod
    def _empty(cls, kind: object, shape: object, code: object) -> np.ndarray:
        """An empty array, whose shape and values are set by its pickled state afterwards. NumPy's own function, or
        ndarray itself, would let the pickle allocate an array of any size."""
        if kind is not cls._ARRAY:
            raise pickle.UnpicklingError("an array must be of NumPy's own class")
        return np.zeros(0, np.uint8)

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return self._empty
        if (module, name) == ("numpy", "ndarray"):
            return self._ARRAY
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes, which protocol 2 stores as latin1 text when Python 3 writes the file."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


def arrays_pickle(path: Path) -> dict[bytes, Any]:
    """The dictionary of a CIFAR "python version" file."""
    from io import BytesIO

    try:
        content = _ArraysOnly(BytesIO(read_bytes(path)), encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(
            f"{path}: must be a pickle of arrays and strings, got {error or type(error).__name__}"
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a dictionary, got {type(content).__name__}")
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


def _entry(path: Path, content: dict[bytes, Any], key: bytes) -> Any:
    if key not in content:
        raise DataError(f"{path}: must have the entry {key.decode()!r}, got {sorted(map(str, content))}")
    return content[key]


def _array(path: Path, content: dict[bytes, Any], key: bytes) -> np.ndarray:
    try:
        return np.asarray(_entry(path, content, key))
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: {key.decode()} must be an array, got {error}") from None


def cifar_pickles(
    folder: Path, train: list[str], test: str, meta: str, key: Literal["labels", "fine_labels"]
) -> tuple[Split, Split, list[str]]:
    """CIFAR's "python version": ``key`` is "labels" or "fine_labels"."""
    names_key = b"label_names" if key == "labels" else b"fine_label_names"
    names = _entry(folder / meta, arrays_pickle(folder / meta), names_key)
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{folder / meta}: {names_key.decode()} must be a list of names, got {reprlib.repr(names)}")
    classes = [name.decode(errors="replace") for name in names]

    def part(name: str) -> Split:
        content = arrays_pickle(folder / name)
        pixels = _array(folder / name, content, b"data")
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
            raise DataError(f"{folder / name}: data must be uint8 (N, 3072), got {pixels.dtype} {pixels.shape}")
        labels = _array(folder / name, content, key.encode())
        if labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise DataError(f"{folder / name}: {key} must be integers (N,), got {labels.dtype} {labels.shape}")
        return checked_split(folder / name, pixels.reshape(-1, 3, 32, 32), labels, len(classes))

    return _joined([part(name) for name in train]), part(test), classes


def cifar_binaries(
    folder: Path, train: list[str], test: str, meta: str, label_bytes: int
) -> tuple[Split, Split, list[str]]:
    """CIFAR's "binary version": records of ``label_bytes`` (the last byte is the class) and 3,072 pixel bytes."""
    classes = class_names(folder / meta)

    def part(name: str) -> Split:
        records = _records(folder / name, read_bytes(folder / name), (-1, label_bytes + 3072))
        pixels = records[:, label_bytes:].reshape(-1, 3, 32, 32)
        return checked_split(folder / name, pixels, records[:, label_bytes - 1], len(classes))

    return _joined([part(name) for name in train]), part(test), classes


def _joined(parts: list[Split]) -> Split:
    return Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def stl10_binaries(folder: Path) -> tuple[Split, Split, list[str]]:
    """STL-10: column-major 96 x 96 colour planes, labels from 1. The unlabelled images are not used."""
    classes = class_names(folder / "class_names.txt")

    def part(name: str) -> Split:
        pixels = _records(folder / f"{name}_X.bin", read_bytes(folder / f"{name}_X.bin"), (-1, 3, 96, 96))
        labels = _records(folder / f"{name}_y.bin", read_bytes(folder / f"{name}_y.bin"), (-1,))
        return checked_split(
            folder / f"{name}_y.bin", pixels.transpose(0, 1, 3, 2), labels.astype(np.int64) - 1, len(classes)
        )

    return part("train"), part("test"), classes


def idx_files(folder: Path, classes: list[str], suffix: str) -> tuple[Split, Split, list[str]]:
    """The four files of MNIST or a data set of the same format; ``suffix`` is ".gz" or ""."""

    def part(name: str) -> Split:
        images = idx(folder / f"{name}-images-idx3-ubyte{suffix}", 3)
        labels_path = folder / f"{name}-labels-idx1-ubyte{suffix}"
        return checked_split(labels_path, images[:, None], idx(labels_path, 1), len(classes))

    return part("train"), part("t10k"), classes


def image_folder(folder: Path, classes: list[str], size: int) -> Split:
    """Images from one folder for each class, as in torchvision's ImageFolder: RGB, short side ``size``, centre crop."""
    files = [(path, label) for label, name in enumerate(classes) for path in _image_files(folder / name)]
    if not files:
        raise DataError(f"{folder}: must hold images in the folders {', '.join(classes[:5])}, got none")
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda file: image_tensor(file[0], size), files))
    return Split(torch.stack(images), torch.tensor([label for _, label in files]))


def _image_files(folder: Path) -> list[Path]:
    """The images below a folder. Links to folders are followed, and each folder is read once. Hidden files are left
    out: macOS writes `._0001.png` beside an image, and Jupyter writes copies into `.ipynb_checkpoints`."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            inner.clear()
            continue
        seen.add(os.path.realpath(place))
        inner[:] = (name for name in inner if not name.startswith("."))
        shown = (Path(place, name) for name in names if not name.startswith("."))
        found += [path for path in shown if path.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found)


@cache
def _image_formats() -> tuple[str, ...]:
    """The formats that an image file may have, whatever its name. Not all of Pillow's: for EPS it runs Ghostscript."""
    from PIL import Image

    Image.init()
    wanted = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    return tuple(name for name in wanted if name in Image.OPEN)


def image_tensor(path: Path | str, size: int, channels: int = 3) -> Tensor:
    """One image file as uint8 (channels, size, size). It is turned by its EXIF orientation, its short side is scaled to
    ``size`` with the filter of :func:`rkl.data.dataset.resized`, and its centre is cropped."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path, formats=_image_formats()) as image:
            upright = _eight_bits(path, ImageOps.exif_transpose(image))
            if "transparency" in upright.info:  # Pillow warns of some conversions that drop it
                upright = upright.convert("RGBA")
            whole = upright.convert("RGB" if channels == 3 else "L")
            fitted = ImageOps.fit(whole, (size, size), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(f"{path}: must have at most {limit:,} pixels, got more") from None
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path}: must be a readable image, got none of {', '.join(_image_formats())}") from None
    except Exception as error:  # a damaged image may raise anything
        raise DataError(f"{path}: must be a readable image, got {told(error)}") from None
    return torch.from_numpy(np.array(fitted)).reshape(size, size, channels).permute(2, 0, 1).contiguous()


def _eight_bits(path: Path | str, image: Any) -> Any:
    """Greys of 16 bits or floats, scaled to 8 bits. Pillow's own conversion would clip them."""
    from PIL import Image

    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        values = 255 * values
    elif image.mode != "F" and low >= 0 and high <= 65535:
        values = values / 257
    elif not (low >= 0 and high <= 255):  # written so that nan is refused
        rule = "0 to 1 or 0 to 255" if image.mode == "F" else "0 to 65,535"
        raise DataError(f"{path}: greys must be within {rule}, got {low:g} to {high:g}")
    return Image.fromarray(np.round(values).astype(np.uint8))


def folders(folder: Path) -> list[str]:
    """The sorted names of the folders in ``folder``, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def class_folders(folder: Path) -> list[str]:
    """The names of the classes: those of the folders in ``folder``."""
    if not folder.is_dir():
        raise MissingDataError(
            f"{folder}: must be a folder with one folder a class, got no such folder",
            "give the folder that holds them as data (--data folder:PATH)",
        )
    classes = folders(folder)
    if len(classes) < 2:
        raise DataError(f"{folder}: must hold at least two folders, one a class, got {len(classes)}")
    for name in classes:
        if not name.isprintable():  # not UTF-8: Python has surrogates there, which no file of a run can hold
            raise DataError(f"{folder}: names of classes must be printable, got {name!r}; rename the folder")
    return classes
