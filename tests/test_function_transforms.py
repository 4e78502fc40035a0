"""torch.func, torch.vmap and forward-mode AD through the public functions, compared with PyTorch's layers."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import rkl_kernels as rk

X = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
T = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(2))
W = torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(3))
P = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(4))
B = torch.randn(3, generator=torch.Generator().manual_seed(5))

CALLS = {
    "trelu": lambda library, x: library.trelu(x),
    "depthwise": lambda library, x: library.depthwise_conv2d(x, W, B, padding=1),
    "separable": lambda library, x: library.separable_conv2d(
        x, W, P, B, padding=1, inner_activation="relu6", activation="trelu"
    ),
    "separable silu": lambda library, x: library.separable_conv2d(
        x, W, P, B, inner_activation="gelu", activation="silu"
    ),
    "separable gelu": lambda library, x: library.separable_conv2d(x, W, P, B, padding=1, activation="gelu"),
}
TRANSFORMS = {
    "grad": lambda f: grad(lambda x: f(x).square().sum())(X),
    "vjp": lambda f: vjp(f, X)[1](torch.ones_like(f(X))),
    "jvp": lambda f: jvp(f, (X,), (T,)),
    "jacrev": lambda f: jacrev(f)(X[:1]),
    "jacfwd": lambda f: jacfwd(f)(X[:1]),
    "hessian": lambda f: hessian(lambda x: f(x).square().sum())(X[:1, :, :3, :3]),
    "grad of grad": lambda f: grad(lambda x: grad(lambda z: f(z).pow(3).sum())(x).square().sum())(X),
    "jvp of grad": lambda f: jvp(grad(lambda x: f(x).square().sum()), (X,), (T,)),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).square().sum()))(X),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(x).square().sum())(X),
    "vmap of vmap of jvp": lambda f: vmap(vmap(lambda x, t: jvp(f, (x,), (t,))))(X[None], T[None]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_transform(call, transform):
    ours, theirs = (transform(lambda x, lib=lib: call(lib, x)) for lib in (rk, rk.reference))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_forward_mode(call):
    def tangent(library):
        with fwad.dual_level():
            return fwad.unpack_dual(call(library, fwad.make_dual(X, T))).tangent

    assert tangent(rk) is not None
    torch.testing.assert_close(tangent(rk), tangent(rk.reference))


def test_gradients_of_one_layer_for_each_sample():
    layer = rk.SeparableConv2d(3, 4, 3, padding=1, activation="trelu")
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return functional_call(layer, parameters, (x[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, X)
    for i, x in enumerate(X):
        alone = grad(loss)(parameters, x)
        torch.testing.assert_close({k: v[i] for k, v in each.items()}, alone)


MAPPED = {
    "images": ((0, None, None), (0, None, None, None)),
    "images, mapped last": ((-1, None, None), (-1, None, None, None)),
    "biases": ((None, None, 0), (None, None, None, 0)),
    "filters": ((None, 0, None), (None, 0, 0, None)),
    "all": ((0, 0, 1), (0, 0, 0, 1)),
}


def counted(function):
    """The result, and how often each operator was called for it."""
    with torch.profiler.profile(acc_events=True) as profile:  # acc_events avoids a warning of torch 2.11 on cycles
        result = function()
    return result, {event.key: event.count for event in profile.key_averages()}


@pytest.mark.parametrize("dims", MAPPED.values(), ids=MAPPED)
def test_vmap_stays_on_the_kernels(dims):
    """The operator is called once, without a warning of a loop. (PyTorch serves pointwise filters that differ.)"""
    depthwise, separable = dims
    tensors = torch.randn(2, 3, 6, 5), W, B, P

    def mapped(t, dim):
        return t if dim is None else torch.stack([t, 2 * t, t - 1], dim)

    x, w, b = (mapped(t, d) for t, d in zip(tensors[:3], depthwise, strict=True))
    args = [mapped(t, d) for t, d in zip((tensors[0], W, P, B), separable, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, calls = counted(lambda: vmap(lambda *t: rk.depthwise_conv2d(*t, padding=1), depthwise)(x, w, b))
        assert 1 <= calls["rkl::depthwise_conv2d"] <= 2  # above vmap and below it
        activated, calls = counted(lambda: vmap(rk.trelu)(x))
        assert 1 <= calls["rkl::trelu"] <= 2
        ours_too, calls = counted(lambda: vmap(lambda *t: rk.separable_conv2d(*t, activation="relu"), separable)(*args))
        assert calls["rkl::separable_conv2d"] + calls.get("rkl::depthwise_conv2d", 0) <= 3
    theirs = vmap(lambda *t: rk.reference.depthwise_conv2d(*t, padding=1), depthwise)(x, w, b)
    theirs_too = vmap(lambda *t: rk.reference.separable_conv2d(*t, activation="relu"), separable)(*args)
    torch.testing.assert_close([ours, ours_too, activated], [theirs, theirs_too, rk.reference.trelu(x)])


def test_vmap_over_pointwise_biases_alone():
    biases = torch.randn(3, 4)
    ours = vmap(lambda bias: rk.separable_conv2d(X, W, P, None, bias))(biases)
    torch.testing.assert_close(ours, torch.stack([rk.separable_conv2d(X, W, P, None, bias) for bias in biases]))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_backward_of_a_mapped_call(call):
    """Ordinary autograd around vmap uses the operators' own gradients."""
    grads = []
    for library in (rk, rk.reference):
        x = X.clone().requires_grad_()
        vmap(lambda q, library=library: call(library, q))(x[:, None]).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_many_gradients_at_once(call):
    """``is_grads_batched`` runs backward under vmap."""
    results = []
    for library in (rk, rk.reference):
        x = X.clone().requires_grad_()
        y = call(library, x)
        weights = torch.stack([torch.ones_like(y), y.detach(), y.detach() ** 2])
        results.append(torch.autograd.grad(y, x, weights, is_grads_batched=True)[0])
    torch.testing.assert_close(*results)


def test_a_forced_backend_says_that_it_cannot():
    with rk.use_backend("cpu"), pytest.raises(RuntimeError, match=r"torch.func.*use_backend\('auto'\)"):
        grad(lambda x: rk.trelu(x).sum())(X)


def test_in_place_under_vmap():
    x = X.clone()
    out = vmap(lambda q: rk.trelu(q.clone(), inplace=True))(x)
    torch.testing.assert_close(out, rk.reference.trelu(X))


def _overwritten(x):
    torch.ops.rkl.trelu_(x)
    return x


def test_the_raw_in_place_operator_under_vmap_and_functionalize():
    expected = rk.reference.trelu(X)
    for dim in (0, 1):
        x = X.clone()
        torch.testing.assert_close(vmap(_overwritten, dim, dim)(x), expected)
        torch.testing.assert_close(x, expected)
    torch.testing.assert_close(vmap(vmap(_overwritten))(X.clone()), expected)
    torch.testing.assert_close(vmap(lambda _: _overwritten(X.clone()))(torch.zeros(2))[1], expected)
    x = X.clone()
    torch.testing.assert_close(functionalize(_overwritten)(x), expected)
    torch.testing.assert_close(x, expected)


def test_the_raw_in_place_operator_has_its_gradient_under_vmap():
    x = X.clone().requires_grad_()
    vmap(_overwritten)(x * 1).square().sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(rk.reference.trelu(x).square().sum(), x)[0])


@pytest.mark.parametrize("name", ["trelu", "depthwise_conv2d", "separable_conv2d"])
def test_explain_under_transforms(name):
    """No plan can be made for a tensor that stands for many."""
    arguments = {"trelu": (), "depthwise_conv2d": (W,), "separable_conv2d": (W, P)}[name]
    alone, said = rk.explain(name, X[:1], *arguments), []

    def explained(x):
        said.append(rk.explain(name, x[None], *arguments))
        return x

    for transform in (vmap, functionalize):
        transform(explained)(X if transform is vmap else X[0])
    for one in said:
        assert (one.backend, one.kernel, one.bytes, one.operations) == (
            alone.backend,
            alone.kernel,
            alone.bytes,
            alone.operations,
        )
        assert one.fused is None
        assert not one.kernels
    grad(lambda x: explained(x).sum())(X[0])
    assert said[-1].backend == "reference"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_many_gradients_at_once_are_differentiated_again(call):
    """``torch.autograd.functional.jacobian(vectorize=True, create_graph=True)``."""
    results = []
    for library in (rk, rk.reference):
        scale = torch.full((), 0.7, requires_grad=True)
        jacobian = torch.autograd.functional.jacobian(
            lambda x, library=library, scale=scale: call(library, x * scale)[0, :, :2, :2],
            X,
            vectorize=True,
            create_graph=True,
        )
        results.append(torch.autograd.grad(jacobian.square().sum(), scale)[0])
    torch.testing.assert_close(*results)


def tangent_of_backward(call, library, dual):
    """The tangent of a plain call's backward with respect to its incoming gradient."""
    x = X.clone().requires_grad_()
    y = call(library, x)
    weights, tangent = torch.ones_like(y), torch.arange(y.numel()).reshape(y.shape).float()

    def backward(weights):
        return torch.autograd.grad(y, x, weights, retain_graph=True)[0]

    if not dual:
        return jvp(backward, (weights,), (tangent,))[1]
    with fwad.dual_level():
        return fwad.unpack_dual(backward(fwad.make_dual(weights, tangent))).tangent


@pytest.mark.parametrize("call", [CALLS[name] for name in ("trelu", "separable", "separable gelu")])  # silu has none
@pytest.mark.parametrize("dual", [True, False])
def test_forward_mode_of_a_backward(call, dual):
    ours, theirs = (tangent_of_backward(call, library, dual) for library in (rk, rk.reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("dual", [True, False])
def test_forward_mode_of_a_depthwise_backward_is_refused_or_right(dual):
    """PyTorch has no tangents for the backward of a device's own convolution. docs/operators.md says what to do."""
    call = CALLS["depthwise"]
    wanted = tangent_of_backward(call, rk.reference, dual)
    with pytest.raises(NotImplementedError, match="forward AD with convolution_backward_overrideable"):
        tangent_of_backward(call, rk, dual)
    with rk.use_backend("reference"):
        torch.testing.assert_close(tangent_of_backward(call, rk, dual), wanted)
    with fwad.dual_level():
        x = X.clone().requires_grad_()
        y = call(rk, x)
        weights = fwad.make_dual(torch.ones_like(y), torch.arange(y.numel()).reshape(y.shape).float())
        torch.testing.assert_close(fwad.unpack_dual(torch.autograd.grad(y, x, weights)[0]).tangent, wanted)
