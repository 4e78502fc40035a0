"""What a forward asks of a value while it is read. A fused copy answers as the model does, or the code is not read."""

from __future__ import annotations

import enum
import math
from collections import namedtuple
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chains import X, assert_same, chain
from torch import nn
from torch.utils._pytree import tree_flatten

import rkl_kernels as rk


class Way(nn.Module):
    """A chain, with attributes and a forward that a test chooses."""

    def __init__(self, way, **attributes) -> None:
        super().__init__()
        self.body, self.way = chain(nn.ReLU()), way
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.way(self, x)


def fused_as(plain: nn.Module, is_read: bool) -> nn.Module:
    """The fused copy, after a check that it gives what the model gives. Its chain is fused, read or not."""
    fused = rk.fuse_for_inference(plain.eval())
    assert isinstance(fused, torch.fx.GraphModule) == is_read
    assert [len(names) for names in fused.fusion_report.fused] == [4]
    assert_same(fused, plain)
    return fused


LOOKED_UP = {
    "a type in a set": lambda m, x: m.body(x) * (2 if x.dtype in {torch.float32, torch.float64} else 1),
    "a size in a set": lambda m, x: m.body(x) * (2 if x.shape[-1] in m.sizes else 1),
    "a size in a dict": lambda m, x: m.body(x) * m.table.get(x.shape[-1], 1.0),
    "a device's type": lambda m, x: m.body(x) * (2 if x.device.type in {"cpu", "xpu"} else 1),
    "a device as text": lambda m, x: m.body(x) * (2 if str(x.device).startswith("cpu") else 1),
    "a size as text": lambda m, x: m.body(x) * m.table.get(str(x.shape[-1]), 1.0),
}


@pytest.mark.parametrize("way", LOOKED_UP)
def test_a_value_looked_up(way):
    fused_as(Way(LOOKED_UP[way], sizes={7, 14}, table={7: 5.0, "7": 4.0}), is_read=False)


def test_a_value_in_an_error():
    """A message may be made from a value that decides nothing. Making it must not stop the reading."""

    def asserting(model, x):
        torch._assert(x.ndim == 4, f"no images: {x.shape}")
        return model.body(x)

    def raising(model, x):
        try:
            raise ValueError(x.shape)
        except ValueError as error:
            return model.body(x) * (2 if str(error) else 1)

    fused_as(Way(asserting), is_read=True)
    fused_as(Way(raising), is_read=False)


class Half(float):
    def __repr__(self) -> str:
        return "half"


class Name(str):
    def __repr__(self) -> str:
        return f"Name({self})"


class Kind(enum.Enum):
    LARGE = 1


class Factor(enum.IntEnum):
    TWO = 2


CONSTANTS = {
    "a number of numpy's": (lambda m, x: m.body(x) * np.sqrt(np.float64(3.0)), True),
    "in a list": (lambda m, x: F.pad(m.body(x), [1, 1], value=np.float64(0.5)), True),
    "a number of its own class": (lambda m, x: m.body(x) * Half(0.5), True),
    "a text of its own class": (lambda m, x: F.interpolate(m.body(x), scale_factor=2.0, mode=Name("nearest")), True),
    "an enum": (lambda m, x: m.body(x) * Factor.TWO, True),
    "infinity": (lambda m, x: m.body(x).clamp(max=math.inf), True),
}


@pytest.mark.parametrize("way", CONSTANTS)
def test_a_constant_of_another_class(way):
    """A graph is a program, and holds only constants that it can write down."""
    fused_as(Way(CONSTANTS[way][0]), is_read=CONSTANTS[way][1])


Pair = namedtuple("Pair", ["image", "number"])

GIVEN = {
    "a number of numpy's": (lambda m, x: (m.body(x), np.float64(2)), False),
    "in a dict": (lambda m, x: {"y": m.body(x), "scale": np.float64(2)}, False),
    "an enum": (lambda m, x: (m.body(x), Kind.LARGE), True),
    "an enum in a dict": (lambda m, x: {"y": m.body(x), "kind": Kind.LARGE}, False),
    "a named tuple in a dict": (lambda m, x: {"y": Pair(m.body(x), 1)}, True),
    "infinity in a dict": (lambda m, x: {"y": m.body(x), "most": math.inf}, True),
}


@pytest.mark.parametrize("way", GIVEN)
def test_a_constant_that_is_given_back(way):
    plain = Way(GIVEN[way][0]).eval()
    fused = rk.fuse_for_inference(plain)
    assert isinstance(fused, torch.fx.GraphModule) == GIVEN[way][1]
    (ours, form), (theirs, want) = tree_flatten(fused(X)), tree_flatten(plain(X))
    assert form == want
    assert [type(value) for value in ours] == [type(value) for value in theirs]
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
    assert ours[1:] == theirs[1:]


class Auxiliary(nn.Module):
    """Returns None for small images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x) if x.shape[-1] > 7 else None


class Paired(Auxiliary):
    def forward(self, x):
        return x * 2, super().forward(x)


def chosen(model, x):
    y = model.body(x)
    return y if model.auxiliary(y) is None else y * 2


def added(model, x):
    y = model.body(x)
    more = model.auxiliary(y)
    if more is not None:
        y = y + more
    return y


def unpacked(model, x):
    y, more = model.paired(model.body(x))
    return y * 2 if more is None else y + more


def attended(model, x):
    tokens = model.body(x).flatten(2).transpose(1, 2)
    y, weights = model.attention(tokens, tokens, tokens, need_weights=False)
    return y * 2 if weights is None else y


def unasked(model, x):
    """The results may be None or not, but no code asks."""
    y, more = model.paired(model.body(x))
    tokens = y.flatten(2).transpose(1, 2)
    tokens, weights = model.attention(tokens, tokens, tokens, need_weights=False)
    if model.none is None:
        y = model.paired(y)[0] + tokens.mean()
    return y, more, weights, model.auxiliary(y)


def parts() -> dict[str, nn.Module | None]:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    return {"auxiliary": Auxiliary(), "paired": Paired(), "attention": attention, "none": None}


@pytest.mark.parametrize("way", [chosen, added, unpacked, attended], ids=lambda way: way.__name__)
def test_code_that_asks_for_none(way):
    """While code is read, the stand-in for a value is never None."""
    plain = Way(way, **parts())
    fused = fused_as(plain, is_read=False)
    wide = torch.cat([X, X], -1)
    torch.testing.assert_close(fused(wide), plain(wide), rtol=1e-4, atol=1e-4)


def test_code_that_does_not_ask_for_none():
    plain = Way(unasked, **parts()).eval()
    fused = rk.fuse_for_inference(plain)
    assert isinstance(fused, torch.fx.GraphModule)
    for x in (X, torch.cat([X, X], -1)):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


@dataclass
class Result:
    image: torch.Tensor
    name: str = "no"


@dataclass
class Doubled(Result):
    def __post_init__(self) -> None:
        self.image = self.image * 2


@dataclass
class Noted(Result):
    note: str = field(init=False, default="made")


class Extended(Result):
    pass


class Swapped(namedtuple("Swapped", ["image", "second"])):
    def __new__(cls, image, second):
        return super().__new__(cls, image * 2, second)


def extended(model, x):
    made = Extended(model.body(x))
    made.more = made.image * 2
    return made


RESULTS = {
    "a dataclass": (lambda m, x: Result(m.body(x), "yes"), True),
    "one that changes a field": (lambda m, x: Doubled(m.body(x)), False),
    "one with a field of its own": (lambda m, x: Noted(m.body(x)), False),
    "one with an attribute more": (extended, False),
    "a tuple that changes what it holds": (lambda m, x: Swapped(m.body(x), 1), False),
    "in a dict": (lambda m, x: {"made": Doubled(m.body(x))}, False),
    "a dataclass in a dict": (lambda m, x: {"made": Result(m.body(x))}, True),
}


@pytest.mark.parametrize("way", RESULTS)
def test_a_result_that_makes_itself(way):
    """A graph makes such a result anew from its fields."""
    plain = Way(RESULTS[way][0]).eval()
    fused = rk.fuse_for_inference(plain)
    assert isinstance(fused, torch.fx.GraphModule) == RESULTS[way][1]
    ours, theirs = (y["made"] if isinstance(y := model(X), dict) else y for model in (fused, plain))
    assert type(ours) is type(theirs)
    held = [{"image": y.image, "second": getattr(y, "second", 0)} | getattr(y, "__dict__", {}) for y in (ours, theirs)]
    assert held[0].keys() == held[1].keys()
    for name, value in held[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, held[1][name], rtol=1e-4, atol=1e-4)
        else:
            assert value == held[1][name]


class Keeping(nn.Module):
    """Keeps what it computed: as an attribute, in a list that others hold, and as the number of images."""

    def __init__(self, notes: list) -> None:
        super().__init__()
        self.body, self.notes, self.last, self.images = chain(nn.ReLU()), notes, None, 1

    def forward(self, x):
        y = self.body(x)
        self.last, self.images = y.mean(), x.shape[0]
        self.notes.append(y)
        return y


class AroundKeeping(nn.Module):
    """Its forward uses what its part keeps, in a way that a test chooses, or ignores it."""

    def __init__(self, way) -> None:
        super().__init__()
        self.notes: list = []
        self.part, self.way = Keeping(self.notes), way
        self.behind = nn.Sequential(nn.Conv2d(4, 6, 1), *chain(nn.ReLU()))

    def forward(self, x):
        self.notes.clear()
        return self.way(self, x)


def plainly(self, x):
    return self.behind(self.part(x))


def with_last(self, x):
    return plainly(self, x), self.part.last


def if_kept(self, x):
    y = plainly(self, x)
    return y if self.part.last is None else y * self.part.last


def of_last_call(self, x):
    before = self.part.images
    return plainly(self, x) * before


def with_notes(self, x):
    y = plainly(self, x)
    return y, sum(note.sum() for note in self.notes)


@pytest.mark.parametrize("way", [plainly, with_last, if_kept, of_last_call, with_notes])
def test_what_a_module_keeps_for_another(way):
    plain = AroundKeeping(way).eval()
    fused = rk.fuse_for_inference(plain)
    assert isinstance(fused, torch.fx.GraphModule) == (way is plainly)
    assert len(fused.fusion_report.fused) == 2
    for x in (X, X[:1], X + 1):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-3)


class Features:
    """An object of the model that holds what hooks have collected."""

    def __init__(self) -> None:
        self.kept: list = []

    def keep(self, layer, images, output) -> None:
        self.kept.append(output)

    def taken(self) -> tuple:
        kept = tuple(self.kept)
        self.kept.clear()
        return kept


class Hooked(nn.Module):
    """Returns what a hook of its first chain has collected. ``hook`` makes that hook from the model."""

    def __init__(self, hook) -> None:
        super().__init__()
        self.body, self.features = chain(nn.ReLU()), Features()
        self.behind = nn.ModuleList((nn.Conv2d(4, 6, 1), *chain(nn.ReLU())))
        self.body.register_forward_hook(hook(self))

    def forward(self, x):
        y = self.body(x)
        for layer in self.behind:
            y = layer(y)
        return y, self.features.taken()


def by_the_model(model):
    return lambda layer, images, output: model.features.keep(layer, images, output)


def by_its_object(model):
    return model.features.keep


def into_its_list(model):
    return partial(lambda kept, layer, images, output: kept.append(output), model.features.kept)


def elsewhere(model):
    return lambda layer, images, output, kept=[]: kept.append(output)


@pytest.mark.parametrize("hook", [by_the_model, by_its_object, into_its_list, elsewhere])
def test_what_a_hook_collects_for_a_forward(hook):
    plain = Hooked(hook).eval()
    fused = rk.fuse_for_inference(plain)
    assert isinstance(fused, torch.fx.GraphModule) == (hook is elsewhere)
    assert len(fused.fusion_report.fused) == 1 + (hook is elsewhere)
    for x in (X, X[:1]):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-3)
