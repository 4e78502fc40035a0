"""In-place T-ReLU beside ``torch.relu_``: tensors that other operators saved, leaves, views, and the raw operator."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import rkl_kernels as rk

IN_PLACE = {
    "relu_": torch.relu_,
    "public": lambda x: rk.trelu(x, inplace=True),
    "layer": rk.TReLU(inplace=True),
    "raw": lambda x: torch.ops.rkl.trelu_(x),
}
each = pytest.mark.parametrize("in_place", IN_PLACE.values(), ids=IN_PLACE)


@each
def test_backward_refuses_what_was_overwritten(in_place):
    x = torch.randn(4, 5, requires_grad=True)
    middle = x * 2
    y = middle.square()  # saves middle
    in_place(middle)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each
@pytest.mark.parametrize("grad", [True, False])
def test_each_write_counts(in_place, grad):
    x = torch.randn(3, requires_grad=grad) * 1.0
    before = x._version
    with torch.set_grad_enabled(grad):
        in_place(x)
    assert x._version == before + 1


@each
def test_a_result_that_is_overwritten_is_refused(in_place):
    x = torch.randn(4, requires_grad=True)
    y = x * 1.0
    in_place(y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each
def test_leaves_are_refused_and_left_alone(in_place):
    for leaf, view in ((torch.randn(3, requires_grad=True),) * 2, (x := torch.randn(3, 4, requires_grad=True), x[1:])):
        before = leaf.detach().clone()
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad is being used in an in-place"):
            in_place(view)
        assert torch.equal(leaf.detach(), before)
    with torch.no_grad():
        in_place(leaf)


def test_the_raw_operator_has_its_gradient():
    x = torch.randn(4, 5, requires_grad=True)
    y = x * 1.0
    torch.ops.rkl.trelu_(y)
    y.square().sum().backward()
    expected = torch.autograd.grad(rk.reference.trelu(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


@each
def test_views_of_what_is_no_leaf(in_place):
    x = torch.randn(4, 6, requires_grad=True)
    base = x * 1.0
    in_place(base[:, 1:4])
    function = torch.relu if in_place is torch.relu_ else rk.reference.trelu
    again = torch.cat([x[:, :1], function(x[:, 1:4]), x[:, 4:]], 1)
    torch.testing.assert_close(base, again)
    weight = torch.randn(4, 6)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (base, again)))


def saving(*parts: str):
    """A policy that saves the results of operators whose names contain one of ``parts``."""

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if any(part in str(op) for part in parts) else CheckpointPolicy.MUST_RECOMPUTE

    return policy


SAVED = {"nothing": (), "activation": ("relu",), "product": ("mm",), "both": ("relu", "mm"), "everything": ("",)}


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("step", [torch.matmul, torch.mul, torch.add], ids=lambda step: step.__name__)
@each
def test_selective_checkpoints_are_right_or_refused(in_place, step, saved):
    """Never silently wrong: overwriting a saved tensor is refused, as it is for relu_."""
    x, weight = torch.randn(5, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True)

    def body(x, weight):
        middle = step(x, weight)
        in_place(middle)
        return middle.square() @ weight

    wanted = torch.autograd.grad(body(x, weight).square().sum(), (x, weight))
    contexts = partial(create_selective_checkpoint_contexts, saving(*saved))
    y = checkpoint(body, x, weight, use_reentrant=False, context_fn=contexts)
    try:
        got = torch.autograd.grad(y.square().sum(), (x, weight))
    except RuntimeError as refused:
        assert "has been mutated" in str(refused)  # noqa: PT017  a refusal is right too
        assert saved
    else:
        torch.testing.assert_close(got, wanted)


def test_inference_mode():
    with torch.inference_mode():
        x = torch.randn(5)
        expected = rk.reference.trelu(x)
        torch.testing.assert_close(rk.trelu(x, inplace=True), expected)


def test_an_inference_tensor_is_not_written_outside_of_inference_mode():
    with torch.inference_mode():
        x = torch.tensor([-1.0, 2.0])
        rk.trelu(x, inplace=True)
    before = x.clone()
    with pytest.raises(RuntimeError, match="inference tensor"):
        rk.trelu(x, inplace=True)
    assert torch.equal(x, before)
    with pytest.raises(RuntimeError, match="inference tensor"):
        torch.relu_(x)


@each
@pytest.mark.parametrize("view", ["unbind", "no_grad"])
def test_a_view_that_autograd_cannot_follow_is_refused_unwritten(in_place, view):
    x = torch.full((2, 3), -1.0, requires_grad=True)
    base = x * 1
    if view == "unbind":
        part = base.unbind()[0]
    else:
        with torch.no_grad():
            part = base[0]
    version = base._version
    with pytest.raises(RuntimeError, match="view"):
        in_place(part)
    assert (base == -1).all()
    assert base._version == version


def test_a_negated_view():
    x = torch.tensor([1 + 2j, -1 - 0.5j])
    assert torch.equal(x.conj().imag.clone(), torch.tensor([-2.0, 0.5]))
    y = x.conj().imag
    want = rk.trelu(y.clone())
    assert rk.trelu(y, inplace=True) is y
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(x.imag, -want)
