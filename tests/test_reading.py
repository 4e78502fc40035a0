"""Which forwards rk.fuse_for_inference can read, and which keep their own code."""

from __future__ import annotations

import copy
import random
from collections import deque
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from chains import Flagged, X, assert_same, chain
from torch import nn

import rkl_kernels as rk
from rkl_kernels._reading_modes import QUESTIONS


class Block(nn.Module):
    """Has its layers as attributes, and a forward that a test chooses."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.dw, self.bn, self.act, self.pw = chain(nn.ReLU())
        self.tail = chain(nn.ReLU(), norm=nn.BatchNorm2d)
        self.tail[3] = nn.Conv2d(6, 6, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.way = [], forward
        self.deep, self.note = {"a": (deque(maxlen=3),)}, SimpleNamespace(calls=0)
        self.back = nn.Conv2d(4, 6, 1)

    def straight(self, x):
        return self.pw(self.act(self.bn(self.dw(x))))

    def forward(self, x):
        return self.tail(self.back(self.way(self, x)))


def tapped(self, x):
    middle = self.dw(x)
    return self.pw(self.act(self.bn(middle))) + middle.mean()


def in_place_between(self, x):
    x = x * 1
    middle = self.dw(x)
    x.add_(1)
    return self.pw(self.act(self.bn(middle))) + x.mean()


def test_an_image_changed_in_place_between():
    plain = Block(in_place_between).eval()
    fused = rk.fuse_for_inference(plain)
    assert ("dw", "bn", "act", "pw") in fused.fusion_report.fused
    with torch.no_grad():
        torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-4)


def twice(self, x):
    return self.straight(x) + self.straight(x + 1)


def without_gradients(self, x):
    with torch.no_grad():
        y = self.dw(x)
    return self.pw(self.bn(y)) + x.mean()


def counting(self, x):
    self.calls += 1
    return self.straight(x) * self.calls


def remembering(self, x):
    self.seen.append(x)
    return self.straight(x)


def drawing(self, x):
    random.random()
    return self.straight(x) + torch.randn(1) * 0


def asking_for_data(self, x):
    return self.straight(x) if x.sum() > 0 else self.straight(-x)


def asking_for_gradients(self, x):
    return self.straight(x) if torch.is_grad_enabled() else self.pw(self.act(self.bn(self.dw(x))))


def asking_for_type(self, x):
    return self.straight(x if isinstance(x, torch.Tensor) else x[0])


def asking_for_an_attribute(self, x):
    return self.straight(x.tensors if hasattr(x, "tensors") else x)


def asking_for_a_result(self, x):
    y = self.straight(x)
    return y if isinstance(y, torch.Tensor) else y[0]


def catching_the_refusal(self, x):
    x = self.straight(x)
    try:
        return x * 2 if x.mean() > -100 else x
    except Exception:  # a model may catch this and go on; the refusal must count all the same
        return x


def asking_for_a_length(self, x):
    x = self.straight(x)
    try:
        return x * len(x)
    except Exception:  # a model may catch this and go on; the refusal must count all the same
        return x


def asking_for_the_type_of_a_shape(self, x):
    x = self.straight(x)
    return x * 2 if isinstance(x.shape, tuple) else x


def asking_for_a_graph(self, x):
    x = self.straight(x)
    return x * 2 if x.grad_fn is None else x


def adding_in_place(self, x):
    y = self.straight(x)
    z = y
    y += 1
    return y + z


def setting_an_item(self, x):
    y = self.straight(x)
    z = y * 1
    z[:, 0] = 0
    return y + z


def unpacking(self, x):
    batch, channels, _, _ = self.straight(x).shape
    first, second = self.straight(x).reshape(2, batch // 2, channels, -1)
    return self.straight(x) + (first + second).mean()


def remembering_deep(self, x):
    x = self.straight(x)
    self.deep["a"][0].append(x.mean())
    return x


def counting_deep(self, x):
    self.note.calls += 1
    return self.straight(x) * self.note.calls


def remembering_elsewhere(self, x):
    x = self.straight(x)
    ELSEWHERE.append(x.mean())
    return x


def casting_by_itself(self, x):
    x = self.straight(x)
    with torch.autocast("cpu", enabled=False):
        return self.pw(self.back(x.float()))


def asking_for_autocast(self, x):
    x = self.straight(x)
    return x * 2 if torch.is_autocast_enabled("cpu") else x


def by_choice(self, x):
    with rk.use_backend("auto"):
        return self.straight(x)


def clamping(self, x):
    self.dw.weight.data.clamp_(-0.01, 0.01)
    return self.straight(x)


def renormed(self, x):
    self.dw.weight.data = torch.renorm(self.dw.weight.data, 2, 0, 0.01)
    return self.straight(x)


def making_a_tensor(self, x):
    return self.straight(x) + torch.ones(1)


def making_a_tensor_once(self, x):
    y = self.straight(x)
    return y + self.deep.setdefault("one", torch.ones(1))


ELSEWHERE = []


def by_reference(self, x):
    with rk.use_backend("reference"):
        return self.straight(x)


WAYS = {
    Block.straight: "",
    twice: "",
    asking_for_type: "asks for the type",
    asking_for_gradients: "",
    asking_for_an_attribute: "",
    tapped: "read 2 times",
    without_gradients: "gradient mode",
    by_reference: "backend",
    counting: "writes to a tensor",
    remembering: "changes the module",
    drawing: "random numbers",
    asking_for_data: "cannot be used",
    asking_for_a_result: "asks for the type",
    catching_the_refusal: "decides on data",
    asking_for_a_length: "asks for a length",
    asking_for_the_type_of_a_shape: "asks for the type",
    asking_for_a_graph: "asks for the grad_fn",
    adding_in_place: "",
    setting_an_item: "",
    unpacking: "",
    remembering_deep: "changes the module",
    counting_deep: "changes the module",
    remembering_elsewhere: "keeps what it computed",
    casting_by_itself: "autocast",
    asking_for_autocast: "depends on autocast",
    by_choice: "backend",
    making_a_tensor: "makes a tensor of its own",
    making_a_tensor_once: "changes the module",
    clamping: "takes its tensors",
    renormed: "takes its tensors",
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_forwards_that_can_be_read_and_that_cannot(way):
    plain = Block(way).eval()
    fused = rk.fuse_for_inference(plain)
    told = fused.fusion_report
    assert ("tail.0", "tail.1", "tail.2", "tail.3") in told.fused
    if WAYS[way]:
        assert list(told.left) == ["dw"]
        assert WAYS[way].lower() in told.left["dw"].lower()
    else:
        assert ("dw", "bn", "act", "pw") in told.fused
        assert isinstance(fused, torch.fx.GraphModule)
    torch.manual_seed(5)
    assert_same(fused, plain)
    assert len(plain.seen) == len(getattr(fused, "seen", plain.seen))


@pytest.mark.parametrize("way", [casting_by_itself, asking_for_autocast], ids=lambda way: way.__name__)
def test_forwards_that_ask_for_autocast(way):
    plain = Block(way).eval()
    fused = rk.fuse_for_inference(plain)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(X), plain(X)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_what_depends_on_gradients_is_left():
    plain = Block(lambda self, x: self.straight(x) * (2 if torch.is_grad_enabled() else 1)).eval()
    fused = rk.fuse_for_inference(plain)
    assert "whether gradients are recorded" in fused.fusion_report.left["dw"]
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize(("module", "name"), QUESTIONS)
def test_what_depends_on_what_it_is_called_for_is_left(module, name):
    """A graph would repeat what the model does in a plain call, even in an exported program."""
    before = getattr(module, name)
    plain = Block(lambda self, x: self.straight(x) * (2 if getattr(module, name)() else 1)).eval()
    fused = rk.fuse_for_inference(plain)
    assert "whether it is compiled, traced or exported" in fused.fusion_report.left["dw"]
    assert getattr(module, name) is before
    assert_same(fused, plain)
    for export in (partial(torch.jit.trace, check_trace=False), lambda *args: torch.export.export(*args).module()):
        torch.testing.assert_close(export(fused, (X,))(X), export(plain, (X,))(X), rtol=1e-4, atol=1e-4)


class Scaling:
    """Does something before and after PyTorch's own call."""

    def __call__(self, x):
        return super().__call__(x / 255) + 1


class ScalingBlock(Scaling, Block):
    pass


class ScalingChain(Scaling, nn.Sequential):
    pass


def test_a_call_of_its_own():
    block = ScalingBlock(Block.straight).eval()
    kept = rk.fuse_for_inference(block)
    assert type(kept) is ScalingBlock
    assert kept.fusion_report.left["dw"] == "in the model: its class has a __call__ of its own"
    assert kept.fusion_report.fused == [("tail.0", "tail.1", "tail.2", "tail.3")]
    assert_same(kept, block)
    steps = ScalingChain(*chain(nn.ReLU())).eval()
    assert_same(rk.fuse_for_inference(steps), steps)
    inner = nn.Sequential(steps, nn.Conv2d(4, 6, 1), block)
    fused = rk.fuse_for_inference(inner)
    assert len(fused.fusion_report.fused) == 3
    assert_same(fused, inner)
    assert_same(rk.fuse_for_inference(torch.fx.symbolic_trace(inner)), inner)


class Sizes(nn.Module):
    """Takes a size and no tensor. PyTorch's C++ code must not take the size's stand-in for a tensor."""

    def forward(self, shape):
        return torch.zeros(shape)


class WithSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.sizes = chain(nn.ReLU()), Sizes()

    def forward(self, x):
        return self.body(x) + self.sizes((4, 9, 7))


def test_a_module_that_takes_no_tensor():
    plain = WithSizes().eval()
    fused = rk.fuse_for_inference(plain)
    assert len(fused.fusion_report.fused) == 1
    assert_same(fused, plain)


def test_a_forward_that_is_none_of_pythons():
    """``torch.relu`` has no Python signature."""
    activation = Sizes()
    activation.forward = torch.relu
    plain = nn.Sequential(chain(nn.ReLU()), activation).eval()
    fused = rk.fuse_for_inference(plain)
    assert len(fused.fusion_report.fused) == 1
    assert_same(fused, plain)


def test_a_sequential_in_code_that_cannot_be_read():
    plain = Flagged().eval()
    fused = rk.fuse_for_inference(plain)
    assert fused.fusion_report.fused == [("body.0", "body.1", "body.2", "body.3")]
    assert type(fused) is Flagged
    assert isinstance(fused.body, nn.Sequential)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_same(fused, plain)
    torch.testing.assert_close(fused(X, True), plain(X, True))
    twin = copy.deepcopy(fused).double()
    torch.testing.assert_close(twin(X.double()), plain.double()(X.double()), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="cannot load weights"):
        fused.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="mode must be False"):
        fused.train()


class Second(nn.Module):
    """Takes a pair and returns one tensor of it."""

    def forward(self, pair):
        return pair[1]


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Second(), *chain(nn.ReLU()))

    def forward(self, x, scale=1):
        return self.body((x, x * scale))


def test_a_sequential_that_takes_no_tensor():
    plain = Pairs().eval()
    fused = rk.fuse_for_inference(plain)
    for scale in (1, 2):
        torch.testing.assert_close(fused(X, scale), plain(X, scale), rtol=1e-4, atol=1e-4)
