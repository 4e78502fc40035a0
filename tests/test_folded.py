"""The layers that fuse_for_inference makes of other convolutions, compared with PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from chains import X, assert_same, chain
from torch import nn

import rkl_kernels as rk
from rkl_kernels.folded import ActivatedConv2d, activate_in_place

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}  # of the largest magnitude
ACTIVATIONS = [None, "relu", "relu6", "trelu", "silu", "gelu"]
LAYERS = [  # (N, C, H, W), C', what else
    ((2, 24, 9, 7), 40, {"kernel_size": 1}),  # a product of few pixels
    ((2, 24, 30, 31), 17, {"kernel_size": 1, "bias": False}),  # of many
    ((3, 24, 1, 1), 8, {"kernel_size": 1}),
    ((2, 24, 9, 7), 40, {"kernel_size": 1, "stride": 2}),
    ((2, 24, 9, 7), 40, {"kernel_size": 1, "padding": 1}),
    ((2, 24, 9, 7), 48, {"kernel_size": 1, "groups": 2}),
    ((2, 3, 20, 21), 16, {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((0, 24, 9, 7), 40, {"kernel_size": 1}),
]


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "outputs", "settings"), LAYERS, ids=str)
def test_activated_convolutions(shape, outputs, settings, dtype, format):
    torch.manual_seed(0)
    layer = ActivatedConv2d(shape[1], outputs, **settings, dtype=dtype).to(memory_format=format)
    plain = nn.Conv2d(shape[1], outputs, **settings, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape).to(dtype).contiguous(memory_format=format)
    with torch.no_grad():
        z, like = plain(x.double()), nn.Conv2d.forward(layer, x)
        for layer.activation in ACTIVATIONS:
            y, want = layer(x), activate_in_place(z.clone(), layer.activation)
            assert (y.shape, y.dtype, y.stride()) == (like.shape, dtype, like.stride())
            if want.numel():
                assert (y.double() - want).abs().max() <= TOLERANCE[dtype] * z.abs().max()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_pass_as_they_do_in_pytorch(activation, kernel):
    """oneDNN's own epilogues turn NaN into zeros."""
    layer = ActivatedConv2d(16, 16, kernel, padding=kernel // 2).to(memory_format=torch.channels_last)
    layer.activation = activation
    x = torch.randn(1, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[0, 0, 3, 0], x[0, 0, 5, 5] = float("nan"), float("inf"), -float("inf")
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x), activate_in_place(nn.Conv2d.forward(layer, x), activation), equal_nan=True, rtol=1e-5, atol=1e-6
        )


def test_padding_that_was_set_later():
    """In other padding modes than zeros, PyTorch pads by the amount that was set when the layer was made."""
    plain = chain(nn.ReLU(), padding_mode="reflect")
    plain[0].padding = (2, 2)
    assert_same(rk.fuse_for_inference(plain), plain)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_one_graph_in_every_mode(mode):
    """The compiler cannot follow code that asks whether a gradient is wanted."""
    dense = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.SiLU(), nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5), nn.ReLU()
    plain = nn.Sequential(*chain(nn.ReLU()), *dense).eval()
    fused = rk.fuse_for_inference(plain)
    with mode():
        for compiled in (
            torch.compile(fused, fullgraph=True, backend="eager"),
            torch.export.export(fused, (X,), strict=True).module(),
        ):
            torch.testing.assert_close(compiled(X), plain(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_frozen_norm_of_another_type(dtype, dense):
    """It computes and returns its own type, while PyTorch's norms return the image's type."""
    norms = pytest.importorskip("torchvision.ops", reason="extra [train] not installed")
    first = nn.Conv2d(6, 6, 3, groups=1 if dense else 6, dtype=dtype), norms.FrozenBatchNorm2d(6)
    plain = nn.Sequential(*first, *(chain(nn.ReLU()) if dense else ())).eval()
    fused = rk.fuse_for_inference(plain)
    is_folded = dtype == torch.float32
    assert bool(fused.fusion_report.folded if dense else fused.fusion_report.fused) == is_folded
    x = X.to(dtype)
    assert fused(x).dtype == plain(x).dtype == torch.float32
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
