"""One training step of ResNet-KL on the emulated CUDA kernels: the gradients of all parameters against fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rkl_kernels as rk
from rkl.distill import LossWeights, training_losses
from rkl.network.blocks import BlockOptions
from rkl.network.model import ResNetKL, all_exits

from .operators import Operators


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter, by the whole self-distillation loss."""
    exits = all_exits(model, images.to(next(model.parameters()).dtype))
    sum(training_losses(exits, labels, LossWeights()).values()).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The distance between all gradients as one vector, relative to the exact vector."""
    assert found.keys() == exact.keys()
    squares = sum((found[name] - exact[name]).square().sum() for name in exact)
    return float((squares / sum(g.square().sum() for g in exact.values())).sqrt())


# Enough images for batch norm's statistics. With 3 images the deepest layers have so few values that rounding errors
# blow up. A step in fp64 whose operators' results are rounded at random, up or down, to fp16 then lies 0.027 to 0.34
# from the exact one, depending on the draw alone. So the ratio of any two implementations would say nothing. With 12
# images it is 0.0049 to 0.0061 for every draw and model.
IMAGES = 12


# "merged" is the default model: its filters are merged into 7 x 7, and are 3 x 3 in the exits, whose gradients are made
# in one pass. "by stage" has another filter size in each stage, and in 16 bits the wide one runs on the tensor cores.
OPTIONS = {"merged": BlockOptions(), "by stage": BlockOptions(scales=(3, 13), scale_mode="stage")}


def build(dtype: torch.dtype, options: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """The model in a type, the same in fp64, images and labels."""
    torch.manual_seed(0)
    model = ResNetKL(classes=4, width=8, image_size=16, options=OPTIONS[options]).to(dtype).train()
    images = torch.randn(IMAGES, 3, 16, 16).to(dtype)
    return model, copy.deepcopy(model).double(), images, torch.arange(IMAGES) % 4


def torch_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradients by PyTorch's own operators, in the model's type."""
    with rk.use_backend("reference"):
        return gradients(model, images, labels)


@pytest.mark.parametrize("options", OPTIONS)
def test_float32_step(operators: Operators, options: str) -> None:
    model, exact, images, labels = build(torch.float32, options)
    found = gradients(model, images, labels)
    assert operators.launches["bias_and_activation"]  # fp32 goes step by step
    assert not operators.launches["separable_rows"]
    assert operators.launches["add_parts"]
    assert distance(found, torch_gradients(exact, images, labels)) < 1e-5  # 1.2e-6 when written


@pytest.mark.parametrize("options", OPTIONS)
def test_float16_step(operators: Operators, options: str) -> None:
    model, exact, images, labels = build(torch.float16, options)
    twin = copy.deepcopy(model)
    found = gradients(model, images, labels)
    assert operators.launches["separable_rows"]
    assert operators.launches["add_parts"]
    for kernel in ("convolve_toeplitz", "filter_grad_toeplitz"):
        assert bool(operators.launches[kernel]) == (options == "by stage"), kernel
    expected = torch_gradients(exact, images, labels)
    # Rounding to 16 bits between operators decides the distance, and PyTorch's own operators round as often. Over four
    # models our distance was 0.87 to 1.03 times theirs, which was 0.0041 to 0.0046.
    theirs = distance(torch_gradients(twin, images, labels), expected)
    assert distance(found, expected) < 1.25 * theirs
