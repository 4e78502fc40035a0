"""The named data sets, and where their files are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from rkl_kernels.errors import told

from . import formats
from .dataset import (
    DataError,
    Dataset,
    MissingDataError,
    Split,
    assemble,
    fingerprint,
    long_tailed,
    resized,
    stratified,
    subset,
)

DEFAULT_ROOT = Path.home() / ".cache" / "rkl" / "data"
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]

PARTS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
"""Names, in lower case, that the parts of a data set have. As names of classes they would train a network to tell the
parts from each other."""

Reader = Callable[[Path], tuple[Split, Split, list[str]]]


@dataclass(frozen=True)
class Source:
    """A data set on disk.

    Attributes:
        readers: one for each form of the files: a file below the root that identifies the form, and its reader.
        flip: whether a mirrored image keeps its class.
        torchvision: the torchvision class that downloads the data set.
        places: other usual folders of the files, after the default root.
    """

    readers: dict[str, Reader]
    flip: bool
    torchvision: str
    places: tuple[Path, ...] = ()


CIFAR10_TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
SOURCES = {
    "fashion-mnist": Source(
        {
            f"{folder}train-images-idx3-ubyte{suffix}": partial(
                formats.idx_files, classes=FASHION_CLASSES, suffix=suffix
            )
            for folder in ("", "FashionMNIST/raw/")
            for suffix in (".gz", "")
        },
        flip=True,
        torchvision="FashionMNIST",
        places=(Path("/usr/share/datasets/fashion-mnist"),),  # Debian's package dataset-fashion-mnist
    ),
    "cifar10": Source(
        {
            "cifar-10-batches-py/data_batch_1": partial(
                formats.cifar_pickles, train=CIFAR10_TRAIN, test="test_batch", meta="batches.meta", key="labels"
            ),
            "cifar-10-batches-bin/data_batch_1.bin": partial(
                formats.cifar_binaries,
                train=[f"{name}.bin" for name in CIFAR10_TRAIN],
                test="test_batch.bin",
                meta="batches.meta.txt",
                label_bytes=1,
            ),
        },
        flip=True,
        torchvision="CIFAR10",
    ),
    "cifar100": Source(
        {
            "cifar-100-python/train": partial(
                formats.cifar_pickles, train=["train"], test="test", meta="meta", key="fine_labels"
            ),
            "cifar-100-binary/train.bin": partial(
                formats.cifar_binaries,
                train=["train.bin"],
                test="test.bin",
                meta="fine_label_names.txt",
                label_bytes=2,
            ),
        },
        flip=True,
        torchvision="CIFAR100",
    ),
    "stl10": Source({"stl10_binary/train_X.bin": formats.stl10_binaries}, flip=True, torchvision="STL10"),
}

NAMES = (*(f"{name}{tail}" for name in ("digits", *SOURCES) for tail in ("", "-lt")), "folder:PATH")
"""The names that :func:`load` accepts."""


def load(
    name: str,
    root: str | Path | None = None,
    image_size: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    *,
    train_size: int | None = None,
    test_size: int | None = None,
    imbalance: float = 100,
    download: bool = False,
) -> Dataset:
    """Load a data set into memory. Its validation split is cut from the training images by ``seed``, class by class.

    Args:
        name: one of :data:`NAMES`. ``folder:PATH`` has one folder for each class, or has such folders in train, val and
            test; a missing val or test is cut from train. ``-lt`` makes the training images long-tailed.
        root: folder of the data set's files; by default the usual folders are searched.
        image_size: height and width; the data set's own by default (digits: 16, twice their own; folders: 64).
        val_fraction: share of the training images held out for validation.
        seed: determines which training images are held out.
        train_size, test_size: use only so many training (validation included) and test images, for small runs.
        imbalance: for the long-tailed form, images of the first class divided by images of the last.
        download: fetch missing files with torchvision into ``root``.

    Raises:
        DataError: an unknown name, a missing or damaged file, or a class missing from a split. One line says which.
    """
    if image_size is not None and image_size < 8:
        raise DataError(f"image_size must be at least 8, got {image_size}")
    if name == "folder:":
        raise DataError("data must name a folder, got 'folder:' without one")
    if name.startswith("folder:"):
        train, val, test, classes = _folder(Path(name.removeprefix("folder:")), image_size or 64)
        flip = True
    else:
        base = name.removesuffix("-lt")
        if base != "digits" and base not in SOURCES:
            raise DataError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
        val, flip = None, base in SOURCES and SOURCES[base].flip
        train, test, classes = _digits() if base == "digits" else _read(base, root, download)
        image_size = image_size or (16 if base == "digits" else None)
        if name.endswith("-lt"):
            train = long_tailed(train, len(classes), imbalance)
    train, test = subset(train, train_size, "train_size"), subset(test, test_size, "test_size")
    # Fingerprints are of the images before scaling, which another machine may round differently.
    parts = {"train": train, "val": val, "test": test}
    seen = {part: fingerprint(split) for part, split in parts.items() if split is not None}
    if image_size is not None:
        train, test = (Split(resized(part.images, image_size), part.labels) for part in (train, test))
    data = assemble(name, classes, train, test, val=val, flip=flip, val_fraction=val_fraction, seed=seed)
    return replace(data, fingerprint=seen)


def _digits() -> tuple[Split, Split, list[str]]:
    """1,797 scans of handwritten digits (UCI, in scikit-learn's wheel). A fixed fifth of each class is the test set."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).view(-1, 1, 8, 8).mul(255 / 16).round().to(torch.uint8)
    whole = Split(images, torch.from_numpy(labels).long())
    test, train = stratified(whole.labels, 0.2, seed=0)
    return whole.select(train), whole.select(test), [str(digit) for digit in range(10)]


def _read(name: str, root: str | Path | None, download: bool) -> tuple[Split, Split, list[str]]:
    source = SOURCES[name]
    roots = (Path(root),) if root is not None else (DEFAULT_ROOT, *source.places)
    found = _find(source, roots)
    if found is None and download:
        _download(name, source, roots[0])
        found = _find(source, roots)
    if found is None:
        wanted = " or ".join(dict.fromkeys(Path(marker).name for marker in source.readers))
        raise MissingDataError(
            f"{name}: no {wanted} under {' or '.join(map(str, roots))}",
            "give the folder that holds it as root (--data-root), or set download (--download)",
        )
    reader, folder = found
    return reader(folder)


def _find(source: Source, roots: tuple[Path, ...]) -> tuple[Reader, Path] | None:
    """The first form whose identifying file exists. A root may also be the folder that holds this file."""
    for root in roots:
        for marker, reader in source.readers.items():
            for path in (root / marker, root / Path(marker).name):
                if path.is_file():
                    return reader, path.parent
    return None


def _download(name: str, source: Source, root: Path) -> None:
    import torchvision

    options = {"split": "train"} if name == "stl10" else {}
    try:
        getattr(torchvision.datasets, source.torchvision)(str(root), download=True, **options)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name}: download into {root} failed: {told(error)}; place the files there by hand") from None


def _folder(path: Path, size: int) -> tuple[Split, Split | None, Split, list[str]]:
    """The user's images, in folders train, val and test or in one folder for each class. Without test, a fixed fifth of
    train becomes the test set."""
    divided = (path / "train").is_dir()
    names = formats.folders(path) if path.is_dir() else []
    beside = [name for name in names if name not in ("train", "val", "test")]
    if divided and beside:
        raise DataError(
            f"{path}: must hold train, val and test alone where it holds train, got {beside[0]!r} besides; "
            "rename it, or rename train where it is a class"
        )
    if names and not divided and all(name.lower() in PARTS for name in names):
        raise DataError(
            f"{path}: must hold one folder a class, or train, val and test, got {', '.join(names)}; rename those"
        )
    classes = formats.class_folders(path / "train" if divided else path)
    parts: dict[str, Split] = {"train": formats.image_folder(path / "train" if divided else path, classes, size)}
    for name in ("val", "test") if divided else ():
        if (path / name).is_dir():
            unknown = sorted(set(formats.folders(path / name)) - set(classes))
            if unknown:
                raise DataError(f"{path / name}: must hold only the classes of train, got {unknown[0]!r} besides")
            parts[name] = formats.image_folder(path / name, classes, size)
    train, test = parts["train"], parts.get("test")
    if test is None:
        taken, kept = stratified(train.labels, 0.2, seed=0)
        train, test = train.select(kept), train.select(taken)
    return train, parts.get("val"), test, classes
