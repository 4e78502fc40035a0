"""Batches have the right pixels and labels, and are the same for the same seed and epoch."""

import pytest
import torch

from rkl.data import DataError, Split, augment, batches, class_weights, load
from rkl.data.dataset import fingerprint


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 12, 12), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(50) % 4, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), flip=True)


def test_digits():
    digits = load("digits", seed=3)
    assert (digits.channels, digits.image_size, digits.num_classes) == (1, 16, 10)
    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.labels.dtype == torch.int64
    assert not digits.train.flip
    for part in (digits.train, digits.val, digits.test):
        shares = part.counts(10) / len(part)
        assert ((shares - 0.1).abs() < 0.01).all()


def test_the_seed_moves_validation_but_not_test():
    first, again, other = load("digits", seed=1), load("digits", seed=1), load("digits", seed=2)
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)
    assert torch.equal(first.test.images, other.test.images)


def test_the_fingerprint_is_of_the_images_that_a_run_uses():
    """It depends neither on the size that images are scaled to, which rounds, nor on the validation split of a seed."""
    first = load("digits").fingerprint
    assert set(first) == {"train", "test"}
    assert load("digits", seed=1, image_size=8, val_fraction=0.3).fingerprint == first
    fewer = load("digits", train_size=100).fingerprint
    assert fewer["train"] != first["train"]
    assert fewer["test"] == first["test"]


def test_the_fingerprint_is_of_the_labels_too():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert len({fingerprint(Split(images, torch.tensor(labels))) for labels in ([0, 1], [1, 0])}) == 2


def test_images_are_normalised_by_the_training_images():
    digits = load("digits", train_size=100, test_size=50)
    values = digits.train.images.double() / 255
    assert (digits.mean[0], digits.std[0]) == pytest.approx((float(values.mean()), float(values.std(correction=0))))
    for part in (digits.train, digits.val, digits.test):
        assert (part.mean, part.std) == (digits.mean, digits.std)


def test_no_augmentation_gives_the_normalised_split_in_order(split):
    got = [(x, y) for x, y in batches(split, 16, num_classes=4, shuffle=False)]
    assert [len(y) for _, y in got] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([y for _, y in got]), split.labels)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (split.mean, split.std))
    assert torch.allclose(torch.cat([x for x, _ in got]) * std + mean, split.images / 255, atol=1e-6)


def test_reproducible_by_seed_and_epoch(split):
    def epoch(seed, number):
        options = {"num_classes": 4, "augment": "trivial", "cutmix": 0.5, "mixup": 0.2, "cutout": 3, "erasing": 0.5}
        return torch.cat([x for x, _ in batches(split, 16, seed=seed, epoch=number, **options)])

    state = torch.get_rng_state()
    assert torch.equal(epoch(1, 2), epoch(1, 2))
    assert not torch.equal(epoch(1, 2), epoch(1, 3))
    assert not torch.equal(epoch(1, 2), epoch(2, 2))
    assert torch.equal(state, torch.get_rng_state()), "the global generator must not move"


def test_ranks_share_the_batches_of_one_process(split):
    options = {"num_classes": 4, "augment": "standard", "cutmix": 1.0, "seed": 5}
    whole = list(batches(split, 8, **options))
    shared = [list(batches(split, 8, rank=rank, world_size=3, **options)) for rank in range(3)]
    assert sum(map(len, shared)) == len(whole) == 7
    for number, (images, labels) in enumerate(whole):
        own_images, own_labels = shared[number % 3][number // 3]
        assert torch.equal(images, own_images)
        assert torch.equal(labels, own_labels)


def test_drop_last_keeps_a_lone_short_batch(split):
    assert [len(y) for _, y in batches(split, 16, num_classes=4, drop_last=True)] == [16, 16, 16]
    assert [len(y) for _, y in batches(split, 64, num_classes=4, drop_last=True)] == [50]


def test_crop_is_a_shift_with_zeros_moving_in():
    images = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(64, 1, 1, 1)
    cropped = augment.crop_and_flip(images, torch.arange(64), 1, False, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    shifts = [padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    seen = [next(i for i, shift in enumerate(shifts) if torch.equal(image[0], shift)) for image in cropped]
    assert set(seen) == set(range(9))


@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_of_an_eighth_and_mirrors_where_the_split_allows_them(flip):
    """Columns are numbered, so an image shows how many of them it lost and in which order they run."""
    numbered = torch.arange(1, 17, dtype=torch.uint8).expand(64, 1, 16, 16)
    split = Split(numbered, torch.zeros(64, dtype=torch.int64), (0.0,), (1 / 255,), flip=flip)
    first, second = (
        [[column for column in image if column] for image in images[:, 0, 8].round().int().tolist()]
        for images, _ in batches(split, 32, num_classes=1, augment="standard")
    )
    assert {16 - len(columns) for columns in first + second} == {0, 1, 2}
    mirrored = sum(columns != sorted(columns) for columns in first + second)
    assert 16 < mirrored < 48 if flip else not mirrored
    assert first != second, "every batch has draws of its own"


def test_half_of_the_images_are_mirrored():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    indices = torch.zeros(100, dtype=torch.int64)
    taken = augment.crop_and_flip(images, indices, 0, True, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(image, images[0].flip(-1)) for image in taken]
    assert all(flipped or torch.equal(image, images[0]) for flipped, image in zip(mirrored, taken, strict=True))
    assert 35 < sum(mirrored) < 65


def test_cutout_is_a_clipped_square():
    holes = (augment.random_cutout(torch.ones(200, 2, 8, 8), 4, torch.Generator().manual_seed(0)) == 0).sum((2, 3))
    assert torch.equal(holes[:, 0], holes[:, 1])
    assert int(holes.max()) == 16
    assert int(holes.min()) == 4


def test_erasing_takes_a_rectangle_of_some_images():
    images = torch.ones(400, 1, 32, 32)
    holes = augment.random_erasing(images, 0.5, torch.Generator().manual_seed(0)) == 0
    share = holes.float().mean((1, 2, 3))
    assert 150 < int((share > 0).sum()) < 250
    assert float(share.max()) <= 0.36
    for hole in holes[share > 0][:20, 0]:
        assert int(hole.sum()) == int(hole.any(0).sum()) * int(hole.any(1).sum()), "a rectangle"


def test_mixing_gives_soft_labels_of_what_is_in_the_image(split):
    """Images are constant with one value for each class, so the pixels show the shares of the label."""
    images = torch.arange(4.0)[split.labels].view(-1, 1, 1, 1).expand(-1, 1, 12, 12).contiguous()
    for cutmix, mixup in ((1.0, 0.0), (0.0, 1.0)):
        mixed, soft = augment.mixed(images, split.labels, 4, cutmix, mixup, torch.Generator().manual_seed(1))
        assert torch.allclose(mixed.mean((1, 2, 3)), soft @ torch.arange(4.0), atol=1e-5)
        assert torch.allclose(soft.sum(1), torch.ones(50))
        assert not torch.equal(mixed, images)
    same, labels = augment.mixed(images, split.labels, 4, 0.0, 0.0, torch.Generator().manual_seed(1))
    assert torch.equal(same, images)
    assert torch.equal(labels, split.labels)


def test_a_batch_may_be_of_any_size(split):
    """A number that torch cannot hold ended in torch's own words, without a name."""
    ((images, _),) = batches(split, 10**20, num_classes=4)
    assert len(images) == len(split)


def test_balanced_sampling_and_class_weights():
    labels = torch.cat([torch.zeros(900, dtype=torch.int64), torch.ones(100, dtype=torch.int64)])
    split = Split(torch.zeros(1000, 1, 8, 8, dtype=torch.uint8), labels)
    drawn = torch.cat([y for _, y in batches(split, 100, num_classes=2, sampling="balanced")])
    assert 420 < int(drawn.sum()) < 580
    assert torch.allclose(class_weights(split, 2), torch.tensor([1000 / 1800, 5.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"augment": "much"}, "augment"), ({"sampling": "odd"}, "sampling"), ({"batch_size": 0}, "batch_size")],
)
def test_wrong_options_are_named(split, options, message):
    options = {"batch_size": 4, **options}
    with pytest.raises(DataError, match=message):
        next(batches(split, options.pop("batch_size"), num_classes=4, **options))
