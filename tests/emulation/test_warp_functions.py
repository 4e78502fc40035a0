"""The emulator's warp functions and its tanh, each on its own, against what the manuals say."""

from __future__ import annotations

import pytest
import torch

from .conftest import DTYPES, ORDERS, Gpu


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_votes(gpu: Gpu, order: str) -> None:
    gpu.schedule(order)
    x = [(7 * lane) % 32 - 9 for lane in range(32)]  # every value once
    out = gpu.empty(13, 32, dtype=torch.int32)
    values = gpu.put(torch.tensor(x, dtype=torch.int32))
    gpu.kernels.warp_functions.warp_functions(values.data_ptr(), 0, out.data_ptr())

    def at(lane: int, source: int, reaches: bool = True) -> int:
        return x[source] if reaches else x[lane]

    lanes = range(32)
    ballot = sum(1 << lane for lane in lanes if x[lane] > 0)
    assert out.tolist() == [
        [x[5]] * 32,
        [x[lane // 8 * 8 + (lane + 1) % 8] for lane in lanes],
        [x[lane ^ 3] for lane in lanes],
        # A source in a lower group of 8 is read. For one in a higher group a lane keeps its own value.
        [at(lane, lane ^ 9, (lane ^ 9) // 8 <= lane // 8) for lane in lanes],
        [at(lane, min(lane + 4, 31), lane + 4 < 32) for lane in lanes],
        [at(lane, min(lane + 3, 31), lane % 16 + 3 < 16) for lane in lanes],
        [at(lane, max(lane - 3, 0), lane >= 3) for lane in lanes],
        [at(lane, max(lane - 3, 0), lane % 8 >= 3) for lane in lanes],
        [ballot - (ballot >> 31 << 32)] * 32,
        [1] * 32,
        [0] * 32,
        [0] * 32,
        [1] * 32,
    ]


NAMES = {name: dtype for dtype, name in DTYPES.items()}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["bf16_16", "f16_16", "bf16_8", "f16_8", "ldmatrix_bf16_16", "ldmatrix_f16_16"])
def test_products(gpu: Gpu, name: str, order: str) -> None:
    gpu.schedule(order)
    torch.manual_seed(0)
    *_, type_, k = name.split("_")
    # Whole numbers up to 8 are exact in every type, and so are the sums of their products. So a wrong place shows.
    a, b = (torch.randint(-8, 9, size).to(NAMES[type_]) for size in ((16, int(k)), (int(k), 8)))
    c = torch.randint(-8, 9, (16, 8)).float()
    d = gpu.put(c)
    kernel = getattr(gpu.kernels.warp_functions, f"product_{name}")
    kernel(gpu.put(a).data_ptr(), gpu.put(b).data_ptr(), d.data_ptr())
    assert torch.equal(d, c + a.float() @ b.float())


@pytest.mark.sanitized
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["stmatrix", "stmatrix_by_hand"])
def test_stores_of_matrices(gpu: Gpu, name: str, order: str) -> None:
    gpu.schedule(order)
    x = gpu.put(torch.arange(256, dtype=torch.int16).view(4, 8, 8))
    out = gpu.empty(4, 8, 8, dtype=torch.int16)
    getattr(gpu.kernels.warp_functions, name)(x.data_ptr(), 0, out.data_ptr())
    assert torch.equal(out, x)


def test_approximate_tanh_is_off_by_what_the_manual_allows(gpu: Gpu) -> None:
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([special, 1e-30 * torch.randn(1000), 3 * torch.randn(7187)])
    y = gpu.empty(x.numel())
    gpu.kernels.warp_functions.tanhs(gpu.put(x).data_ptr(), 0, y.data_ptr())
    torch.testing.assert_close(y[:5], special.tanh(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y[:2].signbit(), x[:2].signbit())
    off = (y[5:].double() / x[5:].double().tanh() - 1) * 2**11
    # The error reaches its limit in both directions, so that a kernel that relies on a better tanh fails its own test.
    assert 0.99 < off.max() <= 1
    assert -1 <= off.min() < -0.99
    assert y[5:].abs().max() == 1
