"""What ``explain`` says of a call: the backend that serves it, its steps, and the bound on its speed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rkl_kernels as rk
from rkl_kernels.planner import Explanation


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_explanation_names_kernel_floor_and_fusion(backend):
    x, depthwise, pointwise = torch.zeros(2, 4, 8, 8), torch.zeros(4, 1, 3, 3), torch.zeros(6, 4, 1, 1)
    with rk.use_backend(backend):
        told = rk.explain("separable_conv2d", x, depthwise, pointwise, padding=1, activation="relu")
    assert told.kernel.endswith(".separable_conv2d")
    text = str(told)
    assert "MB to move" in text
    assert "FLOP a byte" in text
    assert told.fused is False  # so small an output is made unfused
    assert told.reason in text


@pytest.fixture
def one_thread():
    """One thread: the profiler does not see what the threads of a pool call."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def profiled(
    channels: int, outputs: int, size: int, layout: torch.memory_format, dilation: int = 1
) -> tuple[int, int, Explanation]:
    """How many of the library's products and convolutions a forward on the CPU calls, how many tensors it makes, and
    what ``explain`` says of it."""
    x = torch.randn(2, channels, size, size).to(memory_format=layout)
    call = x, torch.randn(channels, 1, 3, 3), torch.randn(outputs, channels, 1, 1)
    with rk.use_backend("cpu"), torch.profiler.profile(profile_memory=True) as profile:
        rk.separable_conv2d(*call, padding=dilation, dilation=dilation)
    names = ("aten::mm", "mkldnn::_linear_pointwise", "aten::mkldnn_convolution")
    calls = sum(event.count for event in profile.key_averages() if event.key in names)
    tensors = sum(e.name() == "[memory]" and e.nbytes() > 0 for e in profile.profiler.kineto_results.events())
    return calls, tensors, rk.explain("separable_conv2d", *call, padding=dilation, dilation=dilation)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "fused"), [(144, 24, 56, True), (64, 64, 32, True), (64, 64, 8, False)]
)
def test_explanation_is_what_the_profiler_sees(one_thread, layout, channels, outputs, size, fused):
    """The library is never called. The only tensor is the output if fused, else the depthwise output too. Unfused NCHW
    images add NHWC copies of image and output."""
    calls, tensors, told = profiled(channels, outputs, size, layout)
    assert not calls
    assert told.fused is (tensors == 1) is fused
    nchw = layout == torch.contiguous_format
    assert tensors == (1 if fused else 4 if nchw else 2)
    assert ("transposed" in told.reason) is nchw


@pytest.mark.parametrize("outputs", [64, 1024, 2048, 4096])
def test_explanation_says_which_images_are_transposed_whole(one_thread, outputs):
    """Where bands of NCHW rows are too thin for a dilation, bands of NHWC rows may be thick enough."""
    _, tensors, told = profiled(64, outputs, 24, torch.contiguous_format, dilation=4)
    whole = told.reason.startswith("images transposed to NHWC, then ")
    assert tensors == (1 if told.fused else 2) + 2 * whole


@pytest.mark.parametrize(
    ("layout", "size", "inner", "remade"),
    [
        (torch.channels_last, 64, None, "the pointwise step takes each band of depthwise rows"),
        (torch.channels_last, 64, "relu", "the pointwise step takes each band of depthwise rows"),
        (torch.channels_last, 2, None, "shared out by pixels and channels"),
        (torch.contiguous_format, 64, None, "in the cache, where rows of NCHW images are transposed"),
        (torch.contiguous_format, 2, None, "images transposed to NHWC, then the depthwise output is made again"),
    ],
)
def test_explanation_says_how_the_filter_gradient_is_made(layout, size, inner, remade):
    """On a CPU, ``explain`` tells the plan that the launcher follows."""
    x = torch.randn(1, 64, size, size).to(memory_format=layout)
    call = x, torch.randn(64, 1, 3, 3), torch.randn(256, 64, 1, 1)
    with rk.use_backend("cpu"):
        told = rk.explain("separable_conv2d", *call, padding=1, inner_activation=inner)
    assert remade in told.reason.partition("backward: ")[2]


def explain_as_cuda(
    monkeypatch, kernel: int, dtype: torch.dtype, layout: torch.memory_format, stride: int = 2
) -> Explanation:
    """The explanation of a separable call as if on a GPU, for tensors that have only shapes."""
    monkeypatch.setattr("rkl_kernels.planner.choose", lambda operator, x, multiplied: "cuda")
    shapes = ((8, 64, 32, 30), (64, 1, kernel, kernel), (48, 64, 1, 1))
    x, *weights = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    return rk.explain("separable_conv2d", x.contiguous(memory_format=layout), *weights, stride=stride, padding=1)


def explain_depthwise_as_cuda(
    monkeypatch, kernel: int, nhwc: bool = True, size: int = 30, bias: bool = False, **window: int
) -> str:
    monkeypatch.setattr("rkl_kernels.planner.choose", lambda operator, x, multiplied: "cuda")
    layout = torch.channels_last if nhwc else torch.contiguous_format
    x = torch.empty(8, 64, 32, size, dtype=torch.bfloat16, device="meta").contiguous(memory_format=layout)
    weight = torch.empty(64, 1, kernel, kernel, dtype=torch.bfloat16, device="meta")
    told = rk.explain("depthwise_conv2d", x, weight, x.new_empty(64) if bias else None, **window)
    assert told.kernels in str(told)
    return told.kernels


def test_explanation_names_each_depthwise_kernel(monkeypatch):
    asked = []

    def plan(geometry, nhwc, dtype, result, device, with_bias):
        asked.append((geometry, nhwc, dtype, result, with_bias))
        return ([1, 5, True], [1, 5, True], [4, 3, True], [])[result]

    monkeypatch.setattr(torch.ops.rkl, "cuda_depthwise_plan", plan, raising=False)
    told = explain_depthwise_as_cuda(monkeypatch, 5, padding=2)
    assert told.startswith("output: rows on the tensor cores")
    assert "image's gradient: rows" in told
    assert "filter's gradient: the tensor cores" in told
    geometry = [8, 64, 32, 30, 32, 30, 5, 5, 1, 1, 2, 2, 1, 1]
    assert asked == [(geometry, True, 1, result, False) for result in range(4)]


@pytest.mark.parametrize(
    ("kernel", "size", "window", "window_of_plan"),
    [
        (3, 1, {"stride": 2, "padding": 1}, [2, 1, 1, 1, 1, 1]),
        (3, 6, {"stride": 9, "padding": 1}, [9, 6, 1, 1, 1, 1]),
        (1, 30, {"dilation": 5}, [1, 1, 0, 0, 1, 1]),
    ],
)
def test_one_output_has_no_stride_and_one_tap_no_dilation(monkeypatch, kernel, size, window, window_of_plan):
    """The operators plan such a call in the same way (csrc/tensor_args.h)."""
    asked = []
    monkeypatch.setattr(
        torch.ops.rkl, "cuda_depthwise_plan", lambda geometry, *_: asked.append(geometry) or [0, True], raising=False
    )
    explain_depthwise_as_cuda(monkeypatch, kernel, size=size, **window)
    assert [geometry[8:] for geometry in asked] == [window_of_plan] * 4


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    ("answer", "fused", "reason"), [([], False, "serves 16-bit"), ([1, 0, 8, 1, 1, 128, 0], True, "on the chip")]
)
def test_explanation_says_what_the_cuda_plan_is(monkeypatch, answer, fused, reason, layout):
    asked = []
    monkeypatch.setattr(
        torch.ops.rkl, "cuda_separable_plan", lambda *arguments: asked.append(arguments) or answer, raising=False
    )
    told = explain_as_cuda(monkeypatch, 3, torch.bfloat16, layout)
    geometry, nhwc = [8, 64, 32, 30, 16, 15, 3, 3, 2, 2, 1, 1, 1, 1], layout == torch.channels_last
    assert [a[:-1] for a in asked] == [(geometry, nhwc, 48, 0, 0, 1)]
    assert told.fused is fused
    assert reason in told.reason
    assert f"{'fused' if fused else 'not fused'}: {told.reason}" in str(told)


@pytest.mark.parametrize(("capability", "balance"), [((8, 0), 10), ((8, 9), 10), ((9, 0), 20), ((10, 0), 20)])
def test_floor_on_a_gpu(monkeypatch, capability, balance):
    """The data sheets' fp32 operations over bytes from memory: 19.5 T over 2 TB, and 67 T over 3.35 TB a second."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with rk.use_backend("reference"), FakeTensorMode():
        told = rk.explain("trelu", torch.empty(4, device="cuda"))
    assert told.floor == f"memory, with 0.12 FLOP a byte where {balance} are in balance"


needs_cuda_extension = pytest.mark.skipif(
    "not built" in rk.backends()["cuda"].reason, reason="asks the CUDA extension, which needs a CUDA compiler to build"
)


@needs_cuda_extension
@pytest.mark.parametrize(("kernel", "dtype"), [(3, torch.float32), (4, torch.float16)])
def test_explanation_asks_the_cuda_extension(monkeypatch, kernel, dtype):
    """This works without a GPU too, since these calls are not served on any."""
    told = explain_as_cuda(monkeypatch, kernel, dtype, torch.channels_last)
    assert "serves 16-bit images, k = 3 at stride" in told.reason


@needs_cuda_extension
@pytest.mark.parametrize(("kernel", "stride", "fused"), [(3, 2, True), (5, 1, True), (5, 2, False), (7, 2, False)])
def test_larger_filters_are_fused_at_stride_1_alone(monkeypatch, kernel, stride, fused):
    told = explain_as_cuda(monkeypatch, kernel, torch.bfloat16, torch.channels_last, stride)
    assert told.fused is fused
    assert ("k = 5 or 7 at stride 1 (" in told.reason) is not fused


@needs_cuda_extension
@pytest.mark.parametrize(("kernel", "stride", "family"), [(3, 3, "the general kernel"), (13, 1, "the tensor cores")])
@pytest.mark.parametrize("nhwc", [True, False])
def test_contiguous_images_are_said_to_be_transposed(monkeypatch, kernel, stride, family, nhwc):
    """Images are said to be transposed where they are, for the general kernel too. Where NCHW has its own kernel they
    are not."""
    told = explain_depthwise_as_cuda(monkeypatch, kernel, nhwc, padding=kernel // 2, stride=stride)
    transposed = "transposed to NHWC, " if not nhwc and family == "the general kernel" else ""
    assert told.startswith(f"output: {transposed}{family}")
    assert f"; gradients of image and filter: {transposed}{family}" in told


@needs_cuda_extension
def test_what_a_bias_keeps_from_pytorch(monkeypatch):
    narrow = {"size": 8, "stride": 2, "padding": 1}
    assert explain_depthwise_as_cuda(monkeypatch, 3, **narrow).startswith("output: PyTorch's own convolution;")
    assert explain_depthwise_as_cuda(monkeypatch, 3, bias=True, **narrow).startswith("output: rows on the tensor cores")


@needs_cuda_extension
@pytest.mark.parametrize(
    ("layout", "stride", "fused"),
    [
        (torch.channels_last, 1, True),
        (torch.channels_last, 2, True),
        (torch.contiguous_format, 1, True),  # transposed to NHWC
        (torch.contiguous_format, 2, False),  # made in planes, where the images lie
    ],
)
def test_contiguous_images_at_stride_2_are_not_fused(monkeypatch, layout, stride, fused):
    assert explain_as_cuda(monkeypatch, 3, torch.bfloat16, layout, stride).fused is fused


MEASURED = {  # where PyTorch's own kernels measured faster; elsewhere nothing is left to them
    torch.float32: torch.backends.cpu.get_cpu_capability() == "AVX512",
    torch.bfloat16: torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_cpu_kernels_are_named(memory, dtype):
    """``explain`` tells which outputs are left to PyTorch, and those outputs are right."""
    nhwc = memory == torch.channels_last
    cases = {  # channels, size, filter: whether it is left to PyTorch
        (4096, 8, 7, 7): False,
        (4096, 8, 5, 5): False,
        (16, 8, 7, 7): False,  # 2,048 elements
        (16, 40, 3, 3): False,
        (12, 136, 3, 3): nhwc,
        (12, 64, 3, 3): False,  # 8,192 pixels
        (3, 136, 3, 3): False,  # two images share vectors
        (3, 64, 3, 3): False,
        (12, 136, 3, 1): False,  # one column, so that pixels can be channels
        (12, 135, 3, 1): nhwc,  # pixels that do not fill vectors
        (24, 136, 3, 1): False,
        (64, 136, 3, 1): False,
    }
    for (channels, size, *kernel), left in cases.items():
        x = torch.randn(2, channels, size, size, dtype=dtype).to(memory_format=memory)
        w, padding = torch.randn(channels, 1, *kernel, dtype=dtype), [k // 2 for k in kernel]
        told = rk.explain("depthwise_conv2d", x, w, padding=padding).kernels
        by_pytorch = torch.ops.rkl.cpu_depthwise_by_pytorch(x, w, [1, 1], padding, [1, 1])
        assert ("PyTorch" in told) == by_pytorch
        assert by_pytorch == (left and MEASURED[dtype]), (channels, size, *kernel)
        got, want = rk.depthwise_conv2d(x, w, padding=padding), rk.reference.depthwise_conv2d(x, w, padding=padding)
        assert got.is_contiguous(memory_format=memory)
        torch.testing.assert_close(got, want, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-4)


@pytest.mark.parametrize("columns", [15, 31])
def test_wide_filters_in_16_bits_are_not_left_to_pytorch(columns):
    """oneDNN's call does not return."""
    x = torch.randn(2, 12, 136, 136, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    w, padding = torch.randn(12, 1, 1, columns, dtype=torch.bfloat16), [0, columns // 2]
    assert not torch.ops.rkl.cpu_depthwise_by_pytorch(x, w, [1, 1], padding, [1, 1])
    want = rk.reference.depthwise_conv2d(x.float(), w.float(), padding=padding)
    torch.testing.assert_close(rk.depthwise_conv2d(x, w, padding=padding).float(), want, rtol=2e-2, atol=1e-4)


X8, W8, P8 = torch.zeros(2, 8, 9, 9), torch.zeros(8, 1, 3, 3), torch.zeros(4, 8, 1, 1)


def test_bytes_and_operations_by_hand():
    """Each tensor is moved once. A product and its sum are two operations."""
    image, pixels = 2 * 8 * 9 * 9, 2 * 7 * 7
    told = rk.explain("depthwise_conv2d", X8, W8, torch.zeros(8))
    assert told.bytes == 4 * (image + 8 * 9 + 8 + 8 * pixels)
    assert told.operations == 2 * pixels * 8 * 9
    told = rk.explain("separable_conv2d", X8, W8, P8, torch.zeros(8), torch.zeros(4))
    assert told.bytes == 4 * (image + 8 * 9 + 4 * 8 + 8 + 4 + 4 * pixels)
    assert told.operations == 2 * pixels * (8 * 9 + 4 * 8)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("trelu", (torch.zeros(3, dtype=torch.int64),)),
        ("trelu", ([1.0],)),
        ("depthwise_conv2d", (X8, W8, torch.zeros(3))),
        ("depthwise_conv2d", (X8, [1.0])),
        ("separable_conv2d", (X8, W8, torch.zeros(4, 7, 1, 1))),
        ("separable_conv2d", (X8, W8, P8, None, torch.zeros(5))),
    ],
)
def test_explain_raises_as_the_call_does(operator, arguments):
    raised = []
    for call in (lambda: rk.explain(operator, *arguments), lambda: getattr(rk, operator)(*arguments)):
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


def test_explanation_is_of_the_tensors_that_autocast_makes():
    x, w, p = torch.zeros(2, 8, 9, 9), torch.zeros(8, 1, 3, 3), torch.zeros(4, 8, 1, 1)
    calls = {"depthwise_conv2d": (w,), "separable_conv2d": (w, p)}
    for operator, weights in calls.items():
        lower = [t.bfloat16() for t in (x, *weights)]
        with torch.autocast("cpu", torch.bfloat16):
            explained = [rk.explain(operator, x.bfloat16(), *weights), rk.explain(operator, *(x, *weights))]
        assert explained == [rk.explain(operator, *lower)] * 2


def test_fake_tensors_are_explained_without_a_plan():
    with FakeTensorMode():
        x, w, p = torch.zeros(2, 8, 9, 9), torch.zeros(8, 1, 3, 3), torch.zeros(4, 8, 1, 1)
        assert rk.explain("depthwise_conv2d", x, w).kernels == ""
        assert rk.explain("separable_conv2d", x, w, p).fused is None


def test_an_activation_is_checked_whichever_backend_serves():
    with rk.use_backend("reference"), pytest.raises(ValueError, match="activation must be None or one of"):
        rk.explain(
            "separable_conv2d",
            torch.zeros(2, 8, 9, 9),
            torch.zeros(8, 1, 3, 3),
            torch.zeros(4, 8, 1, 1),
            activation="foo",
        )
