"""What a fused copy returns, what it refuses, and what it does when one of its layers is written to."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict, namedtuple
from contextlib import suppress
from functools import partial

import pytest
import torch
from chains import Flagged, X, assert_same, chain
from torch import nn

import rkl_kernels as rk

Outputs = namedtuple("Outputs", ["image", "mean"])


class Naming(nn.Module):
    """Returns a type of its own. Its further argument keeps it from being read."""

    def __init__(self, kind, body) -> None:
        super().__init__()
        self.kind, self.body = kind, body

    def forward(self, x, scale=1):
        x = self.body(x)
        return self.kind(image=x * scale) if issubclass(self.kind, dict) else self.kind(x * scale, x.mean())


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.named = chain(nn.ReLU()), Naming(Outputs, chain(nn.ReLU(), norm=nn.BatchNorm2d))
        self.named.body = nn.Identity()

    def forward(self, x):
        named = self.named(self.body(x))
        return named.image if hasattr(named, "image") else named


def test_what_a_closed_module_gives_may_be_anything():
    plain = Asking().eval()
    fused = rk.fuse_for_inference(plain)
    assert type(fused(X)) is torch.Tensor
    assert_same(fused, plain)


class Steps(list):
    """A graph would make a plain list of it."""

    def __init__(self, image, mean):
        super().__init__([image, mean])


class Returning(Naming):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("kind", [Outputs, OrderedDict, dict, Steps], ids=lambda kind: kind.__name__)
def test_what_it_returns_keeps_its_type(kind):
    plain = Returning(kind, chain(nn.ReLU())).eval()
    fused = rk.fuse_for_inference(plain)
    assert isinstance(fused, torch.fx.GraphModule) == (kind is not Steps)
    ours, theirs = fused(X), plain(X)
    assert type(ours) is type(theirs) is kind
    first = "image" if issubclass(kind, dict) else 0
    torch.testing.assert_close(ours[first], theirs[first], rtol=1e-4, atol=1e-4)


def test_a_refusal_leaves_nothing_half_done():
    plain, other = (nn.ModuleList([nn.BatchNorm2d(3), Flagged()]).eval() for _ in range(2))
    fused = rk.fuse_for_inference(plain)
    nn.init.ones_(other[0].running_mean)
    with pytest.raises(RuntimeError, match="cannot load weights"):
        fused.load_state_dict(other.state_dict())
    assert not fused[0].running_mean.any()  # a child before the fused one
    with pytest.raises(ValueError, match="mode must be False"):
        fused.train()
    assert not any(module.training for module in fused.modules())
    assert not any(module.training for module in copy.deepcopy(fused).modules())


class Middle(nn.Module):
    """Can be read, except for a part that takes a flag and stands behind its own norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.behind = nn.ModuleList([nn.BatchNorm2d(6), Flagged()])

    def forward(self, x):
        return self.behind[1](self.behind[0](self.norm(self.first(x))))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("came_by", [lambda model: model, copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("kind", ["graph", "closed", "both"])
def test_a_refused_call_changes_nothing(kind, came_by):
    """This holds for the copy as a whole and for each module in it."""
    plain = {"graph": chain(nn.ReLU()), "closed": nn.ModuleList([nn.BatchNorm2d(3), Flagged()]), "both": Middle()}[kind]
    fused = came_by(rk.fuse_for_inference(plain.eval()))
    assert isinstance(fused, torch.fx.GraphModule) == (kind != "closed")
    assert fused.fusion_report.fused
    other = copy.deepcopy(fused).state_dict()
    for value in other.values():
        value.add_(1)

    def state():
        return {name: value.clone() for name, value in fused.state_dict().items()}

    def flags():
        return [module.training for module in fused.modules()]

    refused = 0
    for name, module in fused.named_modules():
        loaded = {key.removeprefix(f"{name}."): value for key, value in other.items() if key.startswith(name)}
        for call in (module.train, partial(module.load_state_dict, loaded), partial(module.load_state_dict, {}, False)):
            before, modes, said = state(), flags(), ""
            try:
                call()
            except (ValueError, RuntimeError) as error:
                said = str(error)
            if said:
                refused += "fused" in said
                assert flags() == modes, (name, said)
                torch.testing.assert_close(state(), before, rtol=0, atol=0)
            else:
                module.train(False)
    assert refused > 1


def test_a_part_that_refuses_leaves_the_others_as_they_are():
    """The others may be norms that were set to training to take new statistics."""
    fused = rk.fuse_for_inference(nn.ModuleList([nn.BatchNorm2d(3), Flagged(), nn.BatchNorm2d(3)]).eval())
    fused[0].train()
    fused[2].train()
    for part in (fused[1].body, fused[1]):
        with pytest.raises(ValueError, match="mode must be False"):
            part.train()
        assert [module.training for module in fused] == [True, False, True]
        assert not any(module.training for module in fused[1].modules())


def runs_its_steps(fused: nn.Module) -> bool:
    """Whether a call of the fused body is one of its steps."""
    seen: list[object] = []
    handle = fused.body.steps[0].register_forward_hook(lambda *given: seen.append(given))
    fused(X)
    handle.remove()
    return bool(seen)


def never_counted(model):
    """A copy whose tensors do not count their writes."""
    with torch.inference_mode():
        return copy.deepcopy(model).to(torch.float64).to(torch.float32)


def saved_when_compiled(model):
    """Saved after ``nn.Module.compile``, whose result a copy or a file does not hold."""
    model.body.compile(backend="eager")
    return saved_and_loaded(model)


@pytest.mark.parametrize(
    "came_by", [lambda model: model, copy.deepcopy, saved_and_loaded, saved_when_compiled, never_counted]
)
def test_a_copy_of_a_copy_is_as_fused(came_by):
    plain = Flagged().eval()
    with torch.no_grad():
        plain.body[0].weight.mul_(2)
    fused = rk.fuse_for_inference(plain)
    with torch.no_grad():
        fused.body[0].weight.mul_(1)
    assert not runs_its_steps(fused)
    assert not runs_its_steps(copy.deepcopy(fused)), "a copy of what was written to"
    assert not runs_its_steps(saved_and_loaded(fused))
    came = came_by(rk.fuse_for_inference(plain))
    assert runs_its_steps(came)
    torch.testing.assert_close(came(X), plain(X), rtol=1e-4, atol=1e-4)


def test_a_replica_calls_its_own_layers():
    """The layers of a replica by ``nn.DataParallel`` are on another device than the steps."""
    fused = rk.fuse_for_inference(Flagged().eval())
    body = fused.body._replicate_for_data_parallel()
    body[0] = copy.deepcopy(body[0])  # as on the other device
    body[0].weight.data.mul_(2)
    torch.testing.assert_close(body(X), nn.Sequential(*body)(X))
    assert runs_its_steps(fused)


def scaled(layer: nn.Module) -> None:
    layer.weight.mul_(2)


def set_weight(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight * 2)


def set_data(layer: nn.Module) -> None:
    layer.weight.data = layer.weight * 2


def given_bias(layer: nn.Module) -> None:
    layer.bias = nn.Parameter(torch.ones(6))


def given_buffer(layer: nn.Module) -> None:
    layer.register_buffer("further", torch.ones(1))


def hooked(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, inputs, output: output * 2)


def given_forward(layer: nn.Module) -> None:
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 2


CHANGES = [scaled, set_weight, set_data, given_bias, given_buffer, hooked, given_forward, nn.Module.train]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("came_by", [lambda model: model, copy.deepcopy, saved_and_loaded])
def test_a_layer_changed_after_fusing(change, came_by):
    fused = came_by(rk.fuse_for_inference(Flagged().eval()))
    assert runs_its_steps(fused)
    with torch.no_grad():
        change(fused.body[0])
    assert not runs_its_steps(fused)
    assert not runs_its_steps(fused.to(torch.float64).to(torch.float32)), "what was moved was not made anew"
    torch.testing.assert_close(fused(X), fused(X, True)[-1])


@pytest.mark.parametrize("came_by", [lambda model: model, copy.deepcopy, saved_and_loaded])
def test_a_layer_in_the_place_of_another_is_called(came_by):
    fused = came_by(rk.fuse_for_inference(Flagged().eval()))
    fused.body[2] = nn.Identity()
    assert not runs_its_steps(fused)
    torch.testing.assert_close(fused(X), fused(X, True)[-1])


class Writing(nn.Module):
    """Makes another layer's filter from each image. That layer is not its child."""

    def __init__(self, *layers: nn.Conv2d) -> None:
        super().__init__()
        self.layers, self.made = layers, nn.Linear(6, 54)

    def forward(self, x):
        first, *others = self.layers
        first.weight.data.copy_(self.made(x.mean((0, 2, 3))).view(6, 1, 3, 3))
        for layer in others:
            layer.weight.data.copy_(first.weight.mean() + layer.weight.data * 0)
        return x


class Scaling(Writing):
    def forward(self, x):
        for layer in self.layers:
            layer.weight.data.sign_()
        return x


@pytest.mark.parametrize("kind", [Writing, Scaling], ids=lambda kind: kind.__name__)
def test_layers_that_other_code_writes_to(kind):
    body = chain(nn.ReLU())
    plain = nn.Sequential(kind(body[0], body[3]), body).eval()
    fused = rk.fuse_for_inference(plain)
    assert "takes its tensors" in fused.fusion_report.left["1.0"]
    for x in (X, 3 * X + 1):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("is_read", [True, False])
def test_a_lazy_layer_is_made_at_the_first_call(is_read):
    body = nn.Sequential(*chain(nn.ReLU()), nn.Flatten(), nn.LazyLinear(3))
    plain = (body if is_read else Naming(Outputs, body)).eval()
    fused = rk.fuse_for_inference(plain)
    assert [len(names) for names in fused.fusion_report.fused] == [4]
    fused(X)
    plain(X)
    assert not hasattr(plain, "body") or runs_its_steps(fused)
    name = "5" if is_read else "body.5"
    fused.get_submodule(name).load_state_dict(plain.get_submodule(name).state_dict())
    torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [partial(rk.convert, activation="trelu"), rk.restore], ids=["convert", "restore"])
def test_a_copy_that_is_converted_or_restored_after_fusing(change):
    """Layers of another class compute something else than the steps that were made from them."""
    plain = Flagged().eval()
    if change is rk.restore:
        rk.convert(plain, activation="trelu")
    fused = rk.fuse_for_inference(plain)
    change(fused)
    change(plain)
    torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused(X, True)[-1], fused(X), rtol=1e-4, atol=1e-4)


class Sampling(nn.Module):
    """Its own ``train`` keeps a layer in training: a dropout that samples, or a norm that uses batch statistics."""

    def __init__(self, kept: nn.Module) -> None:
        super().__init__()
        self.body, self.kept = chain(nn.ReLU()), kept

    def train(self, mode=True):
        super().train(mode)
        self.kept.train()
        return self

    def forward(self, x):
        return self.kept(self.body(x))


@pytest.mark.parametrize("kept", [nn.Dropout(), nn.BatchNorm2d(4)], ids=["dropout", "norm"])
def test_a_layer_that_a_model_keeps_in_training(kept):
    plain = nn.Sequential(Sampling(kept)).eval()
    fused = rk.fuse_for_inference(plain)
    assert fused.fusion_report.fused == [("0.body.0", "0.body.1", "0.body.2", "0.body.3")]
    for model in (fused, copy.deepcopy(fused), fused.eval()):
        results = []
        for called in (model, plain):
            torch.manual_seed(0)
            results.append(called(X))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flagged, self.body = (
            torch.compile(Flagged(), backend="eager"),
            torch.compile(chain(nn.ReLU()), backend="eager"),
        )

    def forward(self, x, scale=1):
        return self.flagged(x) * scale, self.body(x)


@pytest.mark.parametrize("came_by", [lambda model: model, copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("is_whole", [False, True])
def test_copies_of_a_copy_with_compiled_parts(came_by, is_whole):
    """A copy of a compiled module compiles the copied module anew."""
    plain = Compiled().eval()
    if is_whole:
        plain = torch.compile(plain, backend="eager")
    fused = came_by(rk.fuse_for_inference(plain))
    torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-4)
    assert runs_its_steps(fused.flagged._orig_mod)
    for module in fused.modules():
        with suppress(ValueError):  # a part that can only be fused again refuses to train
            module.train()
            module.train(False)  # where it was not refused
        assert not any(part.training for part in fused.modules())


class SilentlyTrained(nn.Sequential):
    """Its ``train`` returns nothing, as in many models."""

    def train(self, mode=True):
        super().train(mode)


@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda layer: torch.jit.trace(layer, X)], ids=["script", "trace"]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_models_that_answer_otherwise_when_they_are_switched(compiled):
    """TorchScript's modules have no ``requires_grad_``, and autograd records the copies of their parameters."""
    plain = SilentlyTrained(compiled(nn.Conv2d(6, 6, 1)), chain(nn.ReLU()))
    fused = rk.fuse_for_inference(plain)
    assert fused.fusion_report.fused == [("1.0", "1.1", "1.2", "1.3")]
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    plain.eval()
    torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-4)
