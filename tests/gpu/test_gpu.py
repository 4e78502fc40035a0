"""Every backend of a GPU against the float64 reference on the same device. The small tests run under a sanitizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rkl_kernels as rk

BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
DTYPES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 2e-2), "fp16": (torch.float16, 3e-3)}
"""Each type, and the largest accepted error as a share of a result's largest value: 5 roundings in bf16 and 6 in fp16,
where intermediate values are rounded too, and 168 in fp32, where long sums come in another order."""


@pytest.fixture(params=["cuda", "triton", "cpu"])
def backend(request, device):
    if request.param not in BACKENDS[device]:
        pytest.skip(f"not a backend for {device} tensors")
    status = rk.backends()[request.param]
    if not status.available:
        pytest.skip(f"{request.param}: {status.reason}")
    return request.param


def check(function, tensors, device, dtype, tolerance, backend, layout="nhwc"):
    """Compare output and gradients of ``function(library, *tensors)`` with the reference's, relative to each result's
    largest value in the reference. A result that is zero there must be zero. A second call must give the same bits."""
    torch.manual_seed(0)
    formats = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
    mine = []
    for shape in tensors:
        t = torch.randn(shape, device=device).to(dtype)
        mine.append((t.contiguous(memory_format=formats[layout]) if t.dim() == 4 else t).requires_grad_())
    exact = [t.detach().double().requires_grad_() for t in mine]
    with rk.use_backend(backend):
        y = function(rk, *mine)
        grad = torch.randn(y.shape, device=device).to(dtype)
        got = (y, *torch.autograd.grad(y, mine, grad))
        twice = function(rk, *mine)
        again = (twice, *torch.autograd.grad(twice, mine, grad))
    want = function(rk.reference, *exact)
    for a, b, c in zip(got, again, (want, *torch.autograd.grad(want, exact, grad.double())), strict=True):
        assert torch.equal(a, b), "not deterministic"
        error = (a.double() - c).abs().max().item()
        assert error <= tolerance * c.abs().max().item(), error


def test_the_check_goes_by_the_results_own_size(backend, device):
    """Half too much is wrong, however small the values are."""

    def off(library, x):
        return library.trelu(x) * (1e-6 if library is rk.reference else 1.5e-6)

    with pytest.raises(AssertionError, match=r"^\d\.\d+e-0\d"):
        check(off, ((50,),), device, torch.float32, 1e-5, backend)


def depthwise(k, stride=1, dilation=1):
    padding = dilation * (k - 1) // 2
    return lambda library, x, w, b: library.depthwise_conv2d(x, w, b, stride, padding, dilation)


def separable(k, inner=None, activation=None, stride=1):
    return lambda library, x, d, p, db, pb: library.separable_conv2d(
        x, d, p, db, pb, stride, k // 2, inner_activation=inner, activation=activation
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize(("channels", "size", "k", "stride", "dilation"), [
    (40, 13, 3, 1, 1), (64, 30, 3, 2, 1), (24, 17, 5, 1, 1), (96, 14, 7, 1, 1), (16, 21, 3, 1, 4), (8, 20, 13, 1, 1),
])  # fmt: skip
def test_depthwise(backend, device, dtype, layout, channels, size, k, stride, dilation):
    shapes = (3, channels, size, size + 2), (channels, 1, k, k), (channels,)
    check(depthwise(k, stride, dilation), shapes, device, *DTYPES[dtype], backend, layout)


def test_depthwise_kernel_31(backend, device):
    check(depthwise(31), ((2, 8, 32, 32), (8, 1, 31, 31), (8,)), device, torch.bfloat16, 2e-2, backend)


def test_a_sum_beyond_fp16_that_the_bias_brings_back(backend, device):
    """Sums of 9, 6 and 4 taps are 90,000, 60,000 and 40,000 before the bias. One rounding leaves the result finite, two
    do not."""
    x = torch.full((2, 8, 5, 5), 1e4, device=device, dtype=torch.half).contiguous(memory_format=torch.channels_last)
    weight, bias = x.new_ones(8, 1, 3, 3), x.new_full((8,), -4e4)
    with rk.use_backend(backend):
        y = rk.depthwise_conv2d(x, weight, bias, 2, 1)
    rows = torch.tensor([[0, 2, 0], [2, 5, 2], [0, 2, 0]], device=device, dtype=torch.half) * 1e4
    assert torch.equal(y, rows.expand(2, 8, 3, 3))


@pytest.mark.parametrize(("k", "names"), [
    (3, "gradients of image and filter in one pass: rows"), (7, "gradients of image and filter: rows"),
    (31, "gradients of image and filter: the tensor cores"),
])  # fmt: skip
def test_explain_names_the_kernels(device, k, names):
    if device == "cpu":
        pytest.skip("the CPU's kernels are not named")
    x = torch.empty(4, 64, 32, 32, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight = x.new_empty(64, 1, k, k)
    with rk.use_backend("cuda"):
        told = rk.explain("depthwise_conv2d", x, weight, padding=k // 2)
    assert names in told.kernels


# NCHW images in fp32 at stride 2 are not transposed, nor are they in the backward. The pointwise filter's gradient is
# then a batch of products. With 256 outputs it is one product, over images that are transposed for it.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "outputs", "size", "k"), [(32, 64, 20, 3), (72, 40, 13, 5), (64, 256, 8, 7)])
def test_separable(backend, device, dtype, layout, stride, channels, outputs, size, k):
    shapes = (3, channels, size, size), (channels, 1, k, k), (outputs, channels, 1, 1), (channels,), (outputs,)
    check(separable(k, stride=stride), shapes, device, *DTYPES[dtype], backend, layout)


@pytest.mark.parametrize(("inner", "activation"), [("silu", "trelu"), ("trelu", "gelu")])
def test_separable_activations(backend, device, inner, activation):
    shapes = (2, 32, 9, 9), (32, 1, 3, 3), (48, 32, 1, 1), (32,), (48,)
    check(separable(3, inner, activation), shapes, device, torch.float32, 1e-5, backend)


@pytest.mark.parametrize("dilation", [1, 2], ids=["in one kernel", "step by step"])
def test_parameters_in_one_buffer_have_the_kernels_of_others(backend, device, dilation):
    """Kernels for unaligned parameters would round at other places and give other bits."""
    if backend != "cuda":
        pytest.skip("a library's product may go by its arguments' addresses")
    x = torch.randn(3, 32, 14, 14, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    shapes = (32, 1, 3, 3), (48, 32, 1, 1), (32,), (48,)
    numbers = [torch.randn(torch.Size(shape).numel(), device=device, dtype=x.dtype) for shape in shapes]
    buffer = torch.cat([x.new_zeros(1), *numbers])
    views = buffer[1:].split([n.numel() for n in numbers])
    assert all(view.data_ptr() % 16 == 2 for view in views)

    def result(parameters):
        tensors = (p.view(shape) for p, shape in zip(parameters, shapes, strict=True))
        return rk.separable_conv2d(x, *tensors, padding=dilation, dilation=dilation, activation="relu6")

    with rk.use_backend(backend), torch.no_grad():
        assert torch.equal(result(views), result(numbers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 17, 5, 9), (1 << 20,), (7,)], ids=str)
def test_trelu(backend, device, dtype, shape):
    check(lambda library, x: library.trelu(x), (shape,), device, *DTYPES[dtype], backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU6, nn.SiLU, nn.GELU, rk.TReLU])
def test_small_models_fused_for_inference(monkeypatch, device, dtype, layout, activation):
    """A pointwise, a lone depthwise and a dense 3 x 3 convolution, each with its norm and its activation."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    kinds = nn.Conv2d(16, 48, 1), nn.Conv2d(48, 48, 5, padding=2, groups=48), nn.Conv2d(48, 24, 3, 2, bias=False)
    layers = [(conv, nn.BatchNorm2d(conv.out_channels), activation()) for conv in kinds]
    exact = nn.Sequential(*(module for three in layers for module in three)).double().eval()
    kind, tolerance = DTYPES[dtype]
    image = torch.randn(3, 16, 13, 11).to(kind)
    if layout == "nhwc":
        image = image.contiguous(memory_format=torch.channels_last)
    for conv, norm, _ in layers:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        conv.weight.data = conv.weight.data.to(kind).double()
    want = exact(image.double())
    fused = rk.fuse_for_inference(exact.to(kind)).to(device)
    got = fused(image.to(device))
    image.requires_grad_()
    with_gradient = fused(image.to(device))
    assert with_gradient.requires_grad
    for y in (got, with_gradient):
        assert (y.cpu().double() - want).abs().max() <= 2 * tolerance * want.abs().max()


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_small_batches_of_none(backend, device, layout):
    """Empty images and gradients. Their calls ask for plans all the same."""
    for dtype in (torch.float16, torch.float32):
        x = torch.zeros(0, 96, 33, 17, dtype=dtype, device=device)
        x = x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x
        weight = torch.randn(96, 1, 3, 3, dtype=dtype, device=device).requires_grad_()
        with rk.use_backend(backend):
            y = rk.depthwise_conv2d(x.requires_grad_(), weight, None, 1, (4, 3), 2)
            dx, dweight = torch.autograd.grad(y, [x, weight], torch.zeros_like(y))
        assert (y.shape, dx.shape) == ((0, 96, 37, 19), x.shape)
        assert not dweight.any()


def test_small_shapes_for_the_sanitizer(backend, device):
    shapes = (1, 10, 5, 7), (10, 1, 3, 3), (10,)
    check(depthwise(3), shapes, device, torch.bfloat16, 2e-2, backend)
    shapes = (1, 16, 5, 6), (16, 1, 3, 3), (24, 16, 1, 1), (16,), (24,)
    check(separable(3, None, "trelu"), shapes, device, torch.bfloat16, 2e-2, backend)
    check(lambda library, x: library.trelu(x), ((3, 5, 7, 3),), device, torch.float32, 1e-5, backend)


def test_training_step_has_the_gradients_of_the_reference(backend, device):
    torch.manual_seed(0)
    layers = rk.SeparableConv2d(8, 16, 3, padding=1, activation="trelu"), nn.BatchNorm2d(16), rk.DepthwiseConv2d(16, 7)
    model = nn.Sequential(*layers, rk.TReLU(), nn.Flatten(), nn.LazyLinear(10)).to(device)
    images = torch.randn(4, 8, 16, 16, device=device)
    model(images)

    def gradients(name):
        model.zero_grad()
        with rk.use_backend(name):
            nn.functional.cross_entropy(model(images), torch.arange(4, device=device)).backward()
        return [p.grad.clone() for p in model.parameters()]

    for a, b in zip(gradients(backend), gradients("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_call_in_a_cuda_graph(backend, device):
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    x = torch.randn(4, 32, 16, 16, device=device)
    weight = torch.randn(32, 1, 3, 3, device=device)
    with rk.use_backend(backend), torch.no_grad():
        for _ in range(2):
            rk.trelu(rk.depthwise_conv2d(x, weight, padding=1))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = rk.trelu(rk.depthwise_conv2d(x, weight, padding=1))
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, rk.trelu(rk.depthwise_conv2d(x, weight, padding=1)))


OPERATORS = {
    "trelu": (lambda library, x: library.trelu(x), ((2, 16, 9, 11),)),
    "depthwise": (depthwise(3), ((2, 16, 9, 11), (16, 1, 3, 3), (16,))),
    "separable": (separable(3, "relu", "trelu"), ((2, 16, 9, 11), (16, 1, 3, 3), (24, 16, 1, 1), (16,), (24,))),
}


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_step_in_a_cuda_graph(backend, device, name, layout):
    """Forward and backward in 16 bits: a graph captures workspaces, transpositions and the libraries' products too."""
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    function, shapes = OPERATORS[name]
    format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    tensors = [tensors[0].contiguous(memory_format=format), *tensors[1:]]
    for t in tensors:
        t.requires_grad_()

    def step():
        y = function(rk, *tensors)
        return y, *torch.autograd.grad(y, tensors, torch.ones_like(y))

    with rk.use_backend(backend):
        before = torch.cuda.Stream()  # a first step, so that what is set up once is set up here
        before.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(before):
            step()
        torch.cuda.current_stream().wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        with torch.no_grad():
            for t in tensors:
                t.copy_(torch.randn_like(t))
        graph.replay()
        for a, b in zip(got, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_into_one_graph(backend, device, name):
    torch._dynamo.reset()
    function, shapes = OPERATORS[name]
    tensors = [torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    with rk.use_backend(backend):
        y = function(rk, *tensors)
        grad = torch.randn_like(y)
        want = (y, *torch.autograd.grad(y, tensors, grad))
        y = torch.compile(lambda *given: function(rk, *given), fullgraph=True)(*tensors)
        got = (y, *torch.autograd.grad(y, tensors, grad))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", OPERATORS)
def test_out_of_memory_is_torch_s_own_error(backend, device, name):
    if device == "cpu":
        pytest.skip("a CPU's memory has no limit to set")
    torch.cuda.empty_cache()
    function, shapes = OPERATORS[name]
    everything = torch.cuda.mem_get_info()[1]
    x = torch.empty(1024, 16, 64, 64, device=device, dtype=torch.bfloat16)  # 134 MB; the output does not fit any more
    rest = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes[1:]]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 16e6) / everything)
    try:
        with rk.use_backend(backend), pytest.raises(torch.OutOfMemoryError):
            function(rk, x, *rest)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
