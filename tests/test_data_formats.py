"""Every data source, read from small files in its true on-disk format, whole and broken."""

import gzip
import pickle
import shutil
import struct
import warnings

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from rkl.data import NAMES, DataError, batches, load
from rkl.data.formats import image_tensor

RNG = np.random.default_rng(0)


def pixels(count, *shape):
    return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count, classes):
    return np.arange(count) % classes


def write_idx(path, array):
    content = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(root, suffix=".gz"):
    images = {"train": pixels(40, 28, 28), "t10k": pixels(20, 28, 28)}
    for name, array in images.items():
        write_idx(root / f"{name}-images-idx3-ubyte{suffix}", array)
        write_idx(root / f"{name}-labels-idx1-ubyte{suffix}", labels(len(array), 10))
    return images


def write_pickle(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def write_cifar10_pickles(root):
    folder, images = root / "cifar-10-batches-py", pixels(120, 3072)
    write_pickle(folder / "batches.meta", {b"label_names": [f"c{i}".encode() for i in range(10)]})
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = images[20 * index : 20 * index + 20]
        write_pickle(folder / name, {b"data": part, b"labels": labels(20, 10).tolist(), b"batch_label": b"x"})
    return images


def write_cifar10_binaries(root):
    folder, images = root / "cifar-10-batches-bin", pixels(120, 3072)
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join(f"c{i}" for i in range(10)) + "\n\n")
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = images[20 * index : 20 * index + 20]
        records = np.concatenate([labels(20, 10)[:, None].astype(np.uint8), part], 1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return images


def write_cifar100_pickles(root):
    folder, images = root / "cifar-100-python", pixels(500, 3072)
    write_pickle(folder / "meta", {b"fine_label_names": [f"c{i}".encode() for i in range(100)]})
    write_pickle(folder / "train", {b"data": images[:300], b"fine_labels": labels(300, 100).tolist()})
    write_pickle(folder / "test", {b"data": images[300:], b"fine_labels": labels(200, 100).tolist()})
    return images


def write_cifar100_binaries(root):
    folder, images = root / "cifar-100-binary", pixels(500, 3072)
    folder.mkdir()
    (folder / "fine_label_names.txt").write_text("\n".join(f"c{i}" for i in range(100)))
    for name, part in (("train", images[:300]), ("test", images[300:])):
        fine = labels(len(part), 100)[:, None].astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(np.concatenate([fine // 5, fine, part], 1).tobytes())
    return images


def write_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(f"c{i}" for i in range(10)))
    images = {"train": pixels(40, 3, 96, 96), "test": pixels(20, 3, 96, 96)}
    for name, array in images.items():
        (folder / f"{name}_X.bin").write_bytes(array.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{name}_y.bin").write_bytes((labels(len(array), 10) + 1).astype(np.uint8).tobytes())
    return images


def write_folder(root, parts=("",), count=10):
    for part in parts:
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(pixels(20, 30, 3)).save(root / part / name / f"{index}.png")


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_fashion_mnist(tmp_path, suffix):
    images = write_fashion(tmp_path, suffix)
    data = load("fashion-mnist", tmp_path, val_fraction=0.25)
    assert (data.channels, data.image_size, len(data.train), len(data.val), len(data.test)) == (1, 28, 30, 10, 20)
    assert data.test.flip
    assert np.array_equal(data.test.images[:, 0].numpy(), images["t10k"])
    assert data.test.labels.tolist() == [*range(10)] * 2


@pytest.mark.parametrize("write", [write_cifar10_pickles, write_cifar10_binaries])
def test_cifar10(tmp_path, write):
    images = write(tmp_path).reshape(-1, 3, 32, 32)
    data = load("cifar10", tmp_path, val_fraction=0)
    assert data.classes == [f"c{i}" for i in range(10)]
    assert np.array_equal(data.train.images.numpy(), images[:100])
    assert np.array_equal(data.test.images.numpy(), images[100:])
    assert len(data.val) == 0
    assert data.train.flip
    inner = load("cifar10", next(tmp_path.iterdir()), val_fraction=0)
    assert torch.equal(inner.test.images, data.test.images)


@pytest.mark.parametrize("write", [write_cifar100_pickles, write_cifar100_binaries])
def test_cifar100(tmp_path, write):
    images = write(tmp_path).reshape(-1, 3, 32, 32)
    data = load("cifar100", tmp_path)
    assert (data.num_classes, len(data.train), len(data.val)) == (100, 200, 100)
    assert np.array_equal(data.test.images.numpy(), images[300:])
    assert data.test.labels.tolist() == [*range(100)] * 2


def test_stl10(tmp_path):
    images = write_stl10(tmp_path)
    data = load("stl10", tmp_path)
    assert data.image_size == 96
    assert np.array_equal(data.test.images.numpy(), images["test"])
    assert load("stl10", tmp_path, image_size=32).train.images.shape[1:] == (3, 32, 32)


def test_image_folder(tmp_path):
    write_folder(tmp_path)
    data = load(f"folder:{tmp_path}", image_size=16)
    assert data.classes == ["cat", "dog"]
    assert [len(part) for part in (data.train, data.val, data.test)] == [14, 2, 4]
    assert data.train.images.shape[1:] == (3, 16, 16)
    assert data.train.flip


def test_a_channel_of_one_value_is_no_division_by_zero(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.new("RGB", (8, 8), (0, 0, 30 * i)).save(tmp_path / name / f"{i}.png")
    images, _ = next(batches(load(f"folder:{tmp_path}", image_size=8).train, 8, num_classes=2))
    assert images.isfinite().all()


def test_image_folder_with_its_own_splits(tmp_path):
    write_folder(tmp_path, ("train", "val", "test"), 3)
    data = load(f"folder:{tmp_path}", image_size=16)
    assert [len(part) for part in (data.train, data.val, data.test)] == [6, 6, 6]


def test_a_class_that_is_called_train(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"must hold train, val and test alone where it holds train, got 'cat' besides"):
        load(f"folder:{tmp_path}", image_size=16)


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("Valid", "dev"), ("val", "test")])
def test_parts_by_other_names_are_no_classes(tmp_path, names):
    """A network learned to tell the images to train on from those to test on, and nothing else was said of it."""
    write_folder(tmp_path, names, 3)
    told = f"must hold one folder a class, or train, val and test, got {', '.join(sorted(names))}; rename those"
    with pytest.raises(DataError, match=told):
        load(f"folder:{tmp_path}", image_size=16)


def test_a_part_by_another_name_beside_train(tmp_path):
    write_folder(tmp_path, ("train", "valid"), 3)
    with pytest.raises(DataError, match=r"got 'valid' besides; rename it, or rename train where it is a class"):
        load(f"folder:{tmp_path}", image_size=16)


def test_a_part_without_a_class_names_it(tmp_path):
    write_folder(tmp_path, ("train", "test"), 3)
    shutil.rmtree(tmp_path / "test" / "dog")
    with pytest.raises(DataError, match=r"test: every class must have an image, got none of 'dog'"):
        load(f"folder:{tmp_path}", image_size=16)
    shutil.rmtree(tmp_path / "test" / "cat")
    with pytest.raises(DataError, match=r"test: must hold images in the folders cat, dog, got none"):
        load(f"folder:{tmp_path}", image_size=16)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_transparency_is_dropped_in_silence(tmp_path, mode, channels):
    """Pillow warned of it, with a line of its own code."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "plain.png")
    transparency = {"P": bytes(range(256)), "L": 7, "RGB": (1, 2, 3)}[mode]
    image.save(tmp_path / "transparent.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, transparent = (image_tensor(tmp_path / name, 8, channels) for name in ("plain.png", "transparent.png"))
    assert torch.equal(plain, transparent)


def test_long_tail():
    data = load("digits-lt", imbalance=20, val_fraction=0)
    counts = data.train.counts(10)
    assert 18 <= counts[0] / counts[9] <= 22
    assert (counts[1:] <= counts[:-1]).all()
    assert torch.equal(data.test.images, load("digits").test.images)


def test_sizes_are_fixed_and_stratified():
    small, again = (load("digits", train_size=200, test_size=100, seed=seed) for seed in (0, 1))
    assert abs(len(small.train) + len(small.val) - 200) <= 5
    assert torch.equal(small.test.images, again.test.images)
    assert small.test.counts(10).min() >= 9


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def test_truncated_files(tmp_path):
    write_fashion(tmp_path, "")
    truncate(tmp_path / "train-images-idx3-ubyte")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: must hold 31360 bytes of data, got 31353"):
        load("fashion-mnist", tmp_path)
    for write, name, file in (
        (write_cifar10_pickles, "cifar10", "cifar-10-batches-py/data_batch_3"),
        (write_cifar10_binaries, "cifar10", "cifar-10-batches-bin/data_batch_3.bin"),
        (write_stl10, "stl10", "stl10_binary/test_X.bin"),
    ):
        root = tmp_path / write.__name__
        root.mkdir()
        write(root)
        truncate(root / file)
        with pytest.raises(DataError, match=file):
            load(name, root)


def test_truncated_gzip(tmp_path):
    write_fashion(tmp_path)
    truncate(tmp_path / "t10k-labels-idx1-ubyte.gz")
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz: must be a readable file, got EOFError"):
        load("fashion-mnist", tmp_path)


def test_a_missing_file_of_a_set_is_named(tmp_path):
    write_cifar10_pickles(tmp_path)
    (tmp_path / "cifar-10-batches-py/test_batch").unlink()
    with pytest.raises(DataError, match="test_batch: no such file"):
        load("cifar10", tmp_path)


def test_a_pickle_may_not_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    write_cifar10_pickles(tmp_path)
    write_pickle(tmp_path / "cifar-10-batches-py/data_batch_2", {b"data": Evil()})
    with pytest.raises(DataError, match=r"data_batch_2: must be a pickle of arrays and strings, got .*print"):
        load("cifar10", tmp_path)


def test_labels_out_of_range(tmp_path):
    write_fashion(tmp_path, "")
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.full(20, 10))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte: labels must be between 0 and 9, got 10"):
        load("fashion-mnist", tmp_path)
    write_stl10(tmp_path)
    path = tmp_path / "stl10_binary/train_y.bin"
    path.write_bytes(bytes(40))
    with pytest.raises(DataError, match=r"train_y.bin: labels must be between 0 and 9, got -1"):
        load("stl10", tmp_path)


def test_label_and_image_counts_differ(tmp_path):
    write_fashion(tmp_path, "")
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels(19, 10))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte: must hold one label an image"):
        load("fashion-mnist", tmp_path)


def test_a_class_missing_from_one_split(tmp_path):
    write_fashion(tmp_path, "")
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels(20, 9))
    with pytest.raises(DataError, match=r"fashion-mnist test: every class must have an image, got none of 'Boot'"):
        load("fashion-mnist", tmp_path)


def test_wrong_header(tmp_path):
    write_fashion(tmp_path, "")
    write_idx(tmp_path / "train-images-idx3-ubyte", labels(40, 10))
    with pytest.raises(DataError, match="train-images-idx3-ubyte: must be IDX, bytes in 3 dimensions"):
        load("fashion-mnist", tmp_path)


def test_corrupt_image(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "dog/3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"dog/3.png: must be a readable image"):
        load(f"folder:{tmp_path}")
    write_folder(tmp_path / "second")
    path = tmp_path / "second/cat/2.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"cat/2.png: must be a readable image"):
        load(f"folder:{tmp_path / 'second'}")


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    write_folder(tmp_path / "there")
    (tmp_path / "here").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "here" / name).mkdir()
        (tmp_path / "here" / name / "link").symlink_to(tmp_path / "there" / name)
    (tmp_path / "there/cat/again").symlink_to(tmp_path / "there/cat")
    direct, linked = (load(f"folder:{tmp_path / name}") for name in ("there", "here"))
    assert len(direct.train) == len(linked.train)
    assert torch.equal(direct.test.images, linked.test.images)


def test_hidden_files_are_no_images(tmp_path):
    write_folder(tmp_path)
    before = load(f"folder:{tmp_path}").fingerprint
    (tmp_path / "cat/._0001.png").write_bytes(b"\0\5\x16\7 of macOS")
    (tmp_path / "cat/.ipynb_checkpoints").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat/.ipynb_checkpoints/0001-checkpoint.png")
    assert load(f"folder:{tmp_path}").fingerprint == before


def test_too_few_images_for_a_split():
    with pytest.raises(DataError, match=r"val_fraction 0.1 of 10 training images must leave some to validate on"):
        load("digits", train_size=10)
    assert len(load("digits", train_size=10, val_fraction=0).train) == 10


def test_folders_without_a_class(tmp_path):
    write_folder(tmp_path, ("train", "test"), 3)
    for file in (tmp_path / "test/cat").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"test: every class must have an image, got none of 'cat'"):
        load(f"folder:{tmp_path}")
    (tmp_path / "test/cow").mkdir()
    with pytest.raises(DataError, match=r"test: must hold only the classes of train, got 'cow'"):
        load(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {}, r"data must be one of digits.*got 'mnist'"),
        ("cifar100", {"root": "/nowhere"}, r"cifar100: no train or train.bin under /nowhere"),
        ("folder:/nowhere", {}, r"/nowhere: must be a folder"),
        ("digits", {"val_fraction": 1.0}, "val_fraction"),
        ("digits", {"image_size": 4}, "image_size"),
        ("digits", {"train_size": 10**6}, "train_size"),
        ("digits-lt", {"imbalance": 0.5}, "imbalance"),
        ("digits-lt", {"imbalance": float("nan")}, "imbalance"),
    ],
)
def test_wrong_arguments(name, options, message):
    with pytest.raises(DataError, match=message) as error:
        load(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("said", "told"), [("", "OSError: without a message"), ("\nno route\nto it", "OSError: no route")]
)
def test_a_download_that_fails_is_told_in_one_line(tmp_path, monkeypatch, said, told):
    def fails(*_, **__):
        raise OSError(said)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fails)
    with pytest.raises(DataError) as caught:
        load("cifar10", root=tmp_path, download=True)
    assert str(caught.value) == f"cifar10: download into {tmp_path} failed: {told}; place the files there by hand"


def test_names_are_complete():
    assert {"digits", "fashion-mnist", "cifar10", "cifar100", "stl10", "cifar100-lt", "folder:PATH"} <= set(NAMES)
