"""Batches: right pixels, right labels, the same for the same seed and epoch."""

import pytest
import torch
from torchvision.transforms import v2

from rkl.data import DataError, Split, batches, class_weights, load
from rkl.data.loader import cut_mix, random_crop, random_cutout


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


def test_no_augmentation_gives_the_normalised_split_in_order(split):
    got = [(x, y) for x, y in batches(split, 16, num_classes=4, shuffle=False)]
    assert [len(y) for _, y in got] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([y for _, y in got]), split.labels)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (split.mean, split.std))
    assert torch.allclose(torch.cat([x for x, _ in got]) * std + mean, split.images / 255, atol=1e-6)


def test_reproducible_by_seed_and_epoch(split):
    def epoch(seed, number):
        options = {"num_classes": 4, "augment": "standard", "cutmix": True, "cutout": 3}
        return torch.cat([x for x, _ in batches(split, 16, seed=seed, epoch=number, **options)])

    assert torch.equal(epoch(1, 2), epoch(1, 2))
    assert not torch.equal(epoch(1, 2), epoch(1, 3))
    assert not torch.equal(epoch(1, 2), epoch(2, 2))


def test_ranks_share_an_epoch(split):
    labels = [y for rank in range(3) for _, y in batches(split, 8, num_classes=4, seed=5, rank=rank, world_size=3)]
    assert torch.equal(torch.cat(labels).sort().values, split.labels.sort().values)


def test_drop_last_keeps_a_lone_short_batch(split):
    assert [len(y) for _, y in batches(split, 16, num_classes=4, drop_last=True)] == [16, 16, 16]
    assert [len(y) for _, y in batches(split, 64, num_classes=4, drop_last=True)] == [50]


def test_crop_is_a_shift_with_zeros_moving_in():
    images = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(64, 1, 1, 1)
    cropped = random_crop(images, 1, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    shifts = [padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    seen = [next(i for i, shift in enumerate(shifts) if torch.equal(image[0], shift)) for image in cropped]
    assert set(seen) == set(range(9))


def test_cutout_is_a_clipped_square():
    holes = (random_cutout(torch.ones(200, 2, 8, 8), 4, torch.Generator().manual_seed(0)) == 0).sum((2, 3))
    assert torch.equal(holes[:, 0], holes[:, 1])
    assert int(holes.max()) == 16
    assert int(holes.min()) == 4


def test_cutmix_equals_torchvision(monkeypatch):
    images, labels = torch.randn(6, 3, 9, 12), torch.tensor([0, 1, 2, 3, 3, 1])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ours, soft = cut_mix(images, labels, 4, generator)
        generator.manual_seed(seed)
        theirs = v2.CutMix(num_classes=4)
        share = torch.rand((), generator=generator).reshape(1)
        corner = {n: torch.randint(n, (), generator=generator).reshape(1) for n in (9, 12)}
        with monkeypatch.context() as patch:
            patch.setattr(theirs, "_dist", type("Fixed", (), {"sample": staticmethod(lambda *_, s=share: s)}))
            patch.setattr(torch, "randint", lambda n, size, c=corner: c[n])
            expected, expected_soft = theirs(images, labels)
        assert torch.equal(ours, expected)
        assert torch.allclose(soft, expected_soft, atol=1e-6)


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
